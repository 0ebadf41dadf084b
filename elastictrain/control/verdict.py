"""Whose memory changed: judged from what every rank saw of its own state, so that all ranks come to the same verdict.

Two kinds of evidence. A rank's own shard of masters and moments, which nobody else holds, must be what it was right
after the update. Slices of the weights that all ranks hold must be equal: of three replicas or more the majority is
right; of two, the one that follows from the owner's master copy, if that has not changed itself. Where neither says
who is right, nobody is accused, and the state goes back for everybody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Claim:
    """Elements [start, start + numel) of a weight that all ranks hold, and what its owner's master copy makes them."""

    parameter: str
    start: int
    numel: int
    owner: int
    digest: str

    def __str__(self) -> str:
        return f"{self.parameter}[{self.start}:{self.start + self.numel}]"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one rank found."""

    changed: str
    """What of its masters and moments is not what it was right after the update; empty when nothing is."""
    snapshot_holds: bool
    """Its snapshot of them is what they were then."""
    weights_follow: bool
    """The weights that no other rank holds follow from the masters."""
    seen: tuple[str | None, ...] = ()
    """The digest of its own weights for each claim, in order; None for those that it does not hold."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is wrong."""

    ranks: tuple[int, ...]
    """Whose memory changed; empty when it can't be told."""
    problem: str
    """What was found, and where."""
    snapshot_sound: bool
    """Whether the snapshots of this state can be trusted, though the state in the ranks can't."""


def judge(claims: Sequence[Claim], evidence: Sequence[Evidence]) -> Verdict | None:
    """The verdict on what the ranks (by index) found; None when nothing is wrong. Linear in claims times ranks."""
    found: list[tuple[int | None, str]] = []
    sound = all(t.snapshot_holds for t in evidence)
    for rank, told in enumerate(evidence):
        if told.changed:
            found.append((rank, f"{told.changed} of rank {rank} changed between two updates"))
        if not told.snapshot_holds:
            found.append((rank, f"the snapshot of rank {rank} differs from the state that it was made of"))
        if not told.changed and not told.weights_follow:
            found.append((rank, f"weights that only rank {rank} holds no longer follow from its masters"))
    for number, claim in enumerate(claims):
        votes = {rank: vote for rank, told in enumerate(evidence) if (vote := told.seen[number]) is not None}
        owner_holds = not evidence[claim.owner].changed
        right = _right([*votes.values()], claim.digest if owner_holds else None)
        if right is None and not owner_holds:
            continue  # the owner is accused already, and what differs may be the same change
        if right is None:
            found.append((None, f"{claim} differs between the ranks, and nothing says which is right"))
            sound = False
            continue
        odd = [rank for rank, vote in votes.items() if vote != right]
        found += [(rank, f"{claim} of rank {rank} differs from the other ranks'") for rank in odd]
        if owner_holds and claim.digest != right:
            found.append((claim.owner, f"the master copy of {claim} on rank {claim.owner} does not give the weights"))
            sound = False
    if not found:
        return None
    ranks = sorted({rank for rank, _ in found if rank is not None})
    told_first = next((text for rank, text in found if rank is not None), found[0][1])
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return Verdict(tuple(ranks), told_first + more, sound)


def trusted_step(step: int, verify_every: int, restored: int, snapshot_sound: bool) -> int:
    """The newest step whose state can be trusted when that after `step` did not verify.

    Only a state that verified counts, and what the generation was restored from. With every state verified, the one
    before is, and this one's snapshot counts too if it is sound. With fewer, what came since the last one that
    verified was trained on weights that nobody looked at.
    """
    if snapshot_sound and verify_every == 1:
        return step
    return max(step - verify_every, restored)


def _right(votes: Sequence[str], owner: str | None) -> str | None:
    """The digest that counts: what all say, or most of three or more, or the owner's masters if some rank agrees."""
    most, count = Counter(votes).most_common(1)[0]
    if count == len(votes) or (len(votes) > 2 and 2 * count > len(votes)):
        return most
    return owner if owner in votes else None
