"""Runs, their medians and their tables (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

_NEWEST_STEPS = 16


@dataclass(frozen=True, slots=True)
class Recovery:
    """One fault and the recovery from it."""

    seconds: float
    """From the fault (or a node's start) until every rank of the new group had done its first step."""
    pause_s: float
    """From the last step of the old group to the first of the new one, that step included."""
    steps_lost: int
    """Steps that some rank had completed and that had to be done again."""
    phases_s: dict[str, float]
    """Where the seconds went, in order; their sum is `seconds`. Empty where that can't be seen."""
    rank: int
    """The rank that was killed, or came."""
    world_size: int
    """Ranks in the new group."""
    step_s: float
    """What a step took shortly before the fault: the first new step is part of `seconds`."""


@dataclass(frozen=True, slots=True)
class Unrecovered:
    """One fault after which no step was done any more."""

    waited_s: float
    problem: str
    """What the job said last."""


@dataclass(frozen=True, slots=True)
class Stall:
    """One durable checkpoint while training went on, or stood still."""

    stalled_s: float
    """Seconds by which training came later than without the checkpoint."""
    waited_s: float
    """Of these, seconds in which a rank waited; in the others it computed, and shared its processor with the write."""
    write_s: float
    """Until the checkpoint was complete."""


def summary(runs: Sequence[Recovery | Unrecovered]) -> dict[str, Any]:
    """Medians and range over the runs that recovered, and all runs."""
    found: dict[str, Any] = {"recovered": sum(isinstance(run, Recovery) for run in runs), "of": len(runs)}
    recovered = [run for run in runs if isinstance(run, Recovery)]
    if recovered:
        seconds = [run.seconds for run in recovered]
        found |= {
            "median_s": median(seconds),
            "min_s": min(seconds),
            "max_s": max(seconds),
            "median_pause_s": median(run.pause_s for run in recovered),
            "steps_lost": [run.steps_lost for run in recovered],
            "median_phases_s": median_phases(recovered),
        }
    return {**found, "runs": [asdict(run) for run in runs]}


def median_phases(runs: Sequence[Recovery]) -> dict[str, float]:
    """The median of each phase over the runs; these need not sum to the median of the whole."""
    named = {phase: None for run in runs for phase in run.phases_s}
    return {phase: median(run.phases_s[phase] for run in runs if phase in run.phases_s) for phase in named}


def summary_of_stalls(stalls: Sequence[Stall]) -> dict[str, Any]:
    """Medians over the checkpoints, and each of them."""
    return {
        "median_stalled_s": median(stall.stalled_s for stall in stalls),
        "median_waited_s": median(stall.waited_s for stall in stalls),
        "median_write_s": median(stall.write_s for stall in stalls),
        "checkpoints": [asdict(stall) for stall in stalls],
    }


def stalls_of(
    ends: Mapping[int, float], waits_s: Mapping[int, float], written: Mapping[int, tuple[float, float]]
) -> list[Stall]:
    """What each checkpoint cost: from when steps ended, how long ranks waited in each, and (written at, seconds).

    The steps that ended after the checkpoint's own until it was written, and one more, beside as many times the median
    of the other steps until the next checkpoint's: a machine's speed drifts. A checkpoint for which the record stops
    too early is left out.
    """
    took = {step: end - ends[step - 1] for step, end in ends.items() if step - 1 in ends}
    found = []
    for step, (at, write_s) in written.items():
        following = min((other for other in written if other > step), default=max(ends))
        until = next((s for s in range(step + 1, following) if s in took and ends[s] >= at), following)
        beside = [s for s in range(step + 1, until + 2) if s in took]
        others = [took[s] for s in range(until + 2, following + 1) if s in took]
        if others:
            later = sum(took[s] for s in beside) - len(beside) * median(others)
            found.append(Stall(later, sum(waits_s[s] for s in beside), write_s))
    return found


def pace(ends: Iterable[float]) -> float:
    """Median seconds of the newest steps, from the times at which steps ended."""
    return median(b - a for a, b in pairwise(list(ends)[-_NEWEST_STEPS:]))


def phases_between(marks: Mapping[str, float], begun: float) -> dict[str, float]:
    """Durations from the times at which phases ended, in order; one that ended before the one before took 0."""
    phases: dict[str, float] = {}
    for name, at in marks.items():
        phases[name] = max(0.0, at - begun)
        begun = max(begun, at)
    return phases


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    )
