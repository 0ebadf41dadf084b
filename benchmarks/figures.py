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
    """From the kill until every rank of the new group had done its first step."""
    steps_lost: int
    """Steps that some rank had completed and that had to be done again."""
    phases_s: dict[str, float]
    """Where the seconds went, in order; their sum is `seconds`."""
    rank: int
    """The rank that was killed."""
    step_s: float
    """What a step took shortly before the fault: the first new step is part of `seconds`."""


def summary(runs: Sequence[Recovery]) -> dict[str, Any]:
    """Median, range and all runs."""
    seconds = [run.seconds for run in runs]
    return {
        "median_s": median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "steps_lost": [run.steps_lost for run in runs],
        "median_phases_s": median_phases(runs),
        "runs": [asdict(run) for run in runs],
    }


def median_phases(runs: Sequence[Recovery]) -> dict[str, float]:
    """The median of each phase over the runs; these need not sum to the median of the whole."""
    return {phase: median(run.phases_s[phase] for run in runs) for phase in runs[0].phases_s}


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
