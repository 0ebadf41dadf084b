"""Finds memory that changed by itself: one flipped bit in a rank's weights, masters or moments.

    seal     right after an update: digest of the rank's masters and moments
    verify   right before the next update, when forward and backward have used the weights for the last time:
             the shard's digest again, and one of the weights that all ranks hold; one all-reduce of a few integers
             tells every rank whether all is well. If not, the ranks say what they see and judge it alike.

So nothing wrong gets into an update, and the state before it is still in memory. What all ranks hold are all weights
for ZeRO 0 to 2, and the small ones that ZeRO 3 keeps gathered; weights that no other rank holds are compared with
the masters. Where the model is split, "all ranks" are those that hold the same part of it, and an expert's are those
that hold this expert: each such set compares for itself, in the same one collective. Not seen: what changes within an
update, or in gradients and activations.

Cost of both together: the shard twice and the weights once at the speed of `digest`, and one small collective: 1.7 ms
of a step of 180 ms for 0.9 million fp32 parameters, ZeRO 1 on two ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from elastictrain.config import FaultTarget
from elastictrain.control.verdict import Claim, Evidence, Verdict, judge
from elastictrain.engine.digest import WORDS, digest, digests
from elastictrain.engine.zero_state import Piece
from elastictrain.state.tensors import PARTS

T = TypeVar("T")

_NOTHING = torch.iinfo(torch.int64).min
_LOWEST_EXPONENT_BIT = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}


@dataclass(frozen=True, slots=True)
class Replicas:
    """Weights that several ranks hold whole."""

    number: int
    """Among all sets of ranks that hold the same weights, as all ranks count them."""
    ranks: frozenset[int]
    """Who holds them; this rank is one of them."""
    weights: Mapping[str, Tensor]


class Witness:
    """One rank's view of its own memory; the training thread's."""

    def __init__(
        self,
        *,
        rank: int,
        device: torch.device,
        pieces: Sequence[Piece],
        shard: Mapping[str, Tensor],
        unexported: Mapping[str, Tensor],
        replicas: Sequence[Replicas],
        num_sets: int,
        own_weights: Callable[[Piece], Tensor],
    ) -> None:
        """`device` is where collectives find what they add up; `shard` is the export of `pieces`, by what its parts
        hold; `unexported` what else there is of them.

        `replicas` are the weights that others hold too, by who does: this rank's sets, of at most `num_sets` in all.
        `own_weights` gives those of a piece that only this rank holds, flat.
        """
        held = {**shard, **unexported}
        self._rank, self._device = rank, device
        self._replicas, self._num_sets = replicas, num_sets
        self._num_exported = len(shard)
        self._names = list(held)
        self._shard = list(held.values())
        self._replicated = {name: tensor for each in replicas for name, tensor in each.weights.items()}
        self._holders = {name: each.ranks for each in replicas for name in each.weights}
        self._claimed = [piece for piece in pieces if piece.parameter in self._replicated]
        self._sole = [piece for piece in pieces if piece.parameter not in self._replicated]
        self._own_weights = own_weights
        self._seal: list[str] = []

    def seal(self) -> None:
        """Note what the shard is now, right after an update or an import."""
        self._seal = digests(self._shard)

    def verify(self, exported: str | None = None) -> Verdict | None:
        """Collective: whether the state is what it was when it was sealed; None when all is well.

        `exported` is the checksum of the snapshot of this state, where there is one.
        """
        pairs = zip(digests(self._shard)[1:], self._seal[1:], self._names, strict=True)
        changed = next((name for now, then, name in pairs if now != then), "")
        sealed = self._seal[self._num_exported]
        snapshot_holds = exported is None or (not changed if self._on_device else exported == sealed)
        weights_follow = all(torch.equal(_cast(p, w), w) for p in self._sole for w in [self._own_weights(p)])
        told = Evidence(changed, snapshot_holds, weights_follow)
        doubt = bool(changed) or not (snapshot_holds and weights_follow)
        return self._judge(told) if self._any_differs(doubt) else None

    def flip_bit(self, where: FaultTarget) -> None:
        """Change one bit of this rank's state, as bad memory would: a number doubles or is halved."""
        if where == "optimizer":
            tensor = self._shard[0]
        elif self._sole:
            tensor = self._own_weights(self._sole[0])
        else:
            tensor = next(iter(self._replicated.values()))
        # through `data`: autograd is not told, as it would not be
        words = tensor.data.view(-1).view(WORDS[tensor.element_size()])
        words[words.numel() // 2] ^= 1 << _LOWEST_EXPONENT_BIT[tensor.dtype]

    @property
    def _on_device(self) -> bool:
        return bool(self._shard) and self._shard[0].is_cuda

    def _any_differs(self, doubt: bool) -> bool:
        """Whether some rank doubts its own state, or holds other weights than the rest."""
        extremes = [_NOTHING] * 2 * self._num_sets
        for each in self._replicas:
            mine = int(digest(list(each.weights.values())), 16) >> 1  # fits a signed integer, and so does its negative
            extremes[2 * each.number : 2 * each.number + 2] = mine, -mine
        told = torch.tensor([*extremes, doubt], dtype=torch.int64, device=self._device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        *extremes, doubted = told.tolist()
        pairs = zip(extremes[::2], extremes[1::2], strict=True)
        return bool(doubted) or any(high != -low for high, low in pairs if high != _NOTHING)

    def _judge(self, told: Evidence) -> Verdict:
        mine = [
            Claim(p.parameter, p.start, p.numel, self._rank, digest([_cast(p, self._replicated[p.parameter])]))
            for p in self._claimed
        ]
        claims = [claim for part in _gathered(mine) for claim in part]
        seen = tuple(
            digest([self._replicated[c.parameter].detach().view(-1).narrow(0, c.start, c.numel)])
            if c.owner in self._holders.get(c.parameter, ())
            else None
            for c in claims
        )
        evidence = _gathered(replace(told, seen=seen))
        nothing = "the digests of the weights differ between the ranks, and a second look finds nothing"
        return judge(claims, evidence) or Verdict((), nothing, snapshot_sound=True)


def _cast(piece: Piece, weights: Tensor) -> Tensor:
    """What a piece's masters say that the weights are, flat, and where the weights lie."""
    return piece.view(PARTS[0], {}).to(weights)


def _gathered(part: T) -> list[T]:
    """What every rank gives, by rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts
