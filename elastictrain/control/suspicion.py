"""Which rank holds up the others (pure): hangs against the run's own pace, and stragglers against their peers.

All ranks walk through one program and meet in its collectives, so one that stands still soon makes all stand still.
The one to blame is the one that the others wait *for*: not waiting itself, or ahead of a collective that it never
entered, or in another one than came at this place in the step before. What it is doing decides how long is too long,
and a pause of the whole machine, where nobody waits for anybody, is nobody's fault until it is very long.

Cost: linear in the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median

HANG_FACTOR = 10.0
"""Standing still for so many of the longest recent steps is a hang."""
FIRST_STEP_FACTOR = 6.0
"""The first steps of a generation may take so many times longer: caches, kernels and connections are cold."""
DATA_FACTOR = 10.0
"""Waiting for storage may take so many times longer."""
ALL_FACTOR = 5.0
"""When all ranks stand still at once and none waits for another, the machine may be to blame."""
WARM_STEPS = 3
STOPPED_S = 1.0
"""A stopped process is left alone for so long, in seconds: somebody may look at it."""

STRAGGLER_RATIO = 1.5
"""A rank whose own work takes so many times the median of its peers' is a straggler."""
STRAGGLER_MIN_S = 0.02
STRAGGLER_STEPS = 8
"""Steps over which that must hold."""


@dataclass(frozen=True, slots=True)
class RankAt:
    """Where a rank is, as its node's keeper sees it."""

    phase: str
    marks: int
    """Phases begun in this generation: the same number in every rank at the same place of the program."""
    waits: int
    """Collectives waited for in this generation, the one under way among them."""
    waiting: bool
    """Whether it waits for its peers in a collective."""
    silent_s: float
    """Seconds without a sign of life; inf when there never was one."""
    stopped: bool
    """Its process is stopped (SIGSTOP, a debugger)."""
    strayed: bool = False
    """In this step it waited in a collective that is not of the kind that had this place in the step before."""


@dataclass(frozen=True, slots=True)
class Hang:
    """No progress: `ranks` are to blame, or nobody knows who when that is empty."""

    ranks: tuple[int, ...]
    message: str


@dataclass(frozen=True, slots=True)
class Straggler:
    """A rank that is slower than its peers."""

    rank: int
    own_s: float
    """Median seconds of its own work in a step."""
    others_s: float
    """The same of its peers."""

    @property
    def ratio(self) -> float:
        """How many times slower it is."""
        return self.own_s / self.others_s if self.others_s > 0 else float("inf")


def patience_s(recent_steps_s: Sequence[float], num_done: int, least_s: float, unknown_s: float) -> float:
    """How long a rank may stand still, in seconds, after `num_done` steps of this generation.

    `recent_steps_s` are the durations of the run's last steps, of earlier generations too; `unknown_s` counts where
    there are none yet, and never less than `least_s`.
    """
    if not recent_steps_s:
        return unknown_s
    own = max(least_s, HANG_FACTOR * max(recent_steps_s))
    return own if num_done >= WARM_STEPS else min(unknown_s, FIRST_STEP_FACTOR * own)


def find_stopped(ranks: Mapping[int, RankAt], patience_s: float = STOPPED_S) -> Hang | None:
    """Whose process is stopped, whatever it was doing: all that can be said of ranks that form a group."""
    stopped = {r: at for r, at in ranks.items() if at.stopped and at.silent_s > patience_s}
    if not stopped:
        return None
    since = _longest(stopped)
    return Hang(tuple(stopped), "its process is stopped" + (f", since {since:.1f} s" if since < inf else ""))


def find_hang(ranks: Mapping[int, RankAt], patience_s: float, lockstep: bool = True) -> Hang | None:
    """Who holds up the others for longer than `patience_s`; None while nobody does.

    `lockstep` says that all ranks walk through the same phases and collectives, as the stages of a pipeline do not.
    """
    ranks = {r: at for r, at in ranks.items() if at.phase != "idle"}  # done, or paused
    if not ranks:
        return None
    stopped = find_stopped(ranks, min(patience_s, STOPPED_S))
    if stopped:
        return stopped
    working = {r: at for r, at in ranks.items() if not at.waiting}
    if not working:
        return _all_wait(ranks, patience_s, lockstep)
    factor = ALL_FACTOR if len(working) == len(ranks) > 1 else 1.0
    silent = {r: at for r, at in working.items() if at.silent_s > factor * patience_s * _allowance(at)}
    if len(silent) < len(working):
        return None  # somebody still moves, or may be slow for a good reason: the others may wait for that one
    phases = " and ".join(sorted({at.phase for at in silent.values()}))
    waiting = f"{len(ranks) - len(working)} of {len(ranks)} ranks wait for it"
    message = f"no progress for {_longest(silent):.1f} s in {phases}; {waiting} (patience {patience_s:.1f} s)"
    return Hang(tuple(silent), message)


def _all_wait(ranks: Mapping[int, RankAt], patience_s: float, lockstep: bool) -> Hang | None:
    """All wait in collectives, so they do not wait for the same one."""
    if min(at.silent_s for at in ranks.values()) <= patience_s:
        return None
    # the program's collectives come in one order: who is further and has entered no more of them left one out
    skipped = tuple(
        rank
        for rank, at in ranks.items()
        if lockstep and any(at.marks > other.marks and at.waits <= other.waits for other in ranks.values())
    )
    # within one phase: the one whose step goes otherwise than before, where that of its peers does not
    strayed = tuple(
        rank
        for rank, at in ranks.items()
        if at.strayed and any(at.waits == other.waits and not other.strayed for other in ranks.values())
    )
    if skipped or strayed:
        message = f"left out a collective that the others wait in, for {_longest(ranks):.1f} s now"
    else:
        message = f"all ranks wait for each other, for {_longest(ranks):.1f} s"
    return Hang(skipped or strayed, message)


def _allowance(at: RankAt) -> float:
    return DATA_FACTOR if at.phase in ("data", "waiting") else 1.0


def _longest(ranks: Mapping[int, RankAt]) -> float:
    return max(at.silent_s for at in ranks.values())


def find_straggler(own_s: Mapping[int, Sequence[float]]) -> Straggler | None:
    """The slowest rank, if it is one: `own_s` has each rank's seconds of own work in the same recent steps.

    The ranks all have the same work to do: stages of a pipeline are no peers.

    Own work is the step without waiting for peers, for data and for snapshots, so a slow peer, slow storage or a slow
    machine for all makes nobody a straggler.
    """
    if len(own_s) < 2 or min(len(steps) for steps in own_s.values()) < STRAGGLER_STEPS:
        return None
    typical = {rank: median(steps[-STRAGGLER_STEPS:]) for rank, steps in own_s.items()}
    slowest = max(typical, key=lambda rank: typical[rank])
    peers = [rank for rank in own_s if rank != slowest]
    others = median(typical[rank] for rank in peers)
    limit = max(STRAGGLER_RATIO * others, others + STRAGGLER_MIN_S)
    recent = zip(own_s[slowest][-STRAGGLER_STEPS:], *(own_s[rank][-STRAGGLER_STEPS:] for rank in peers), strict=True)
    slow_steps = sum(own > STRAGGLER_RATIO * median(rest) for own, *rest in recent)
    if typical[slowest] <= limit or slow_steps < STRAGGLER_STEPS - 1:
        return None
    return Straggler(slowest, typical[slowest], others)
