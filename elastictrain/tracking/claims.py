"""Who lays claim to which part of a run's time (pure): the events of an attempt as spans, for the ledger to cut.

A span says "from here to there it was this". Spans overlap, and the ledger gives each moment to the strongest claim,
in the order of `CLAIMS`. A step is one claim, which the ledger divides by what its ranks waited for.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from math import inf
from typing import NamedTuple

from elastictrain.events import (
    DRIVER_LOST,
    Evaluated,
    FailureDetected,
    GenerationStarted,
)
from elastictrain.tracking.attempts import Attempt
from elastictrain.tracking.step_times import StepTime, times

CLAIMS = (
    "down",
    "detection",
    "lost",
    "recovery",
    "resize",
    "step",
    "evaluation",
    "shutdown",
    "startup",
)
"""The strongest claim on a moment first."""


class Span(NamedTuple):
    """A claim on the time from `start` to `stop` (unix seconds)."""

    start: float
    stop: float
    claim: str
    place: int = -1
    """Of a step that stands: its place among the run's events."""


class _Steps:
    """What the claims need of an attempt's steps, 32 bytes each."""

    def __init__(self, attempt: Attempt) -> None:
        self.places, self.generations = array("q"), array("q")
        self.begun_at, self.finished_at = array("d"), array("d")
        for place, event in zip(attempt.events.places, times(attempt.events)):
            if isinstance(event, StepTime):
                self.places.append(place)
                self.generations.append(event.generation)
                self.begun_at.append(event.begun_at)
                self.finished_at.append(event.finished_at)


def claims_of(attempt: Attempt, undone: Container[int]) -> Iterator[Span]:
    """Every claim of one attempt's events on its time; `undone` has the places of the steps that did not stay."""
    steps = _Steps(attempt)
    failures = [e for e in attempt.others if isinstance(e, FailureDetected) and e.kind != DRIVER_LOST]  # it is `down`
    generations = [e for e in attempt.others if isinstance(e, GenerationStarted)]
    evaluations = [e for e in attempt.others if isinstance(e, Evaluated)]
    yield Span(attempt.begun_at, min(steps.begun_at, default=attempt.ended_at), "startup")
    for begun_at, finished_at, place in zip(steps.begun_at, steps.finished_at, steps.places):
        if place in undone:
            yield Span(begun_at, finished_at, "lost")
        else:
            yield Span(begun_at, finished_at, "step", place)
    for evaluation in evaluations:
        busy = chain(steps.finished_at, (g.at for g in generations))
        begun_at = max((t for t in busy if t <= evaluation.at), default=evaluation.at)
        yield Span(begun_at, evaluation.at, "evaluation")
    worked = chain(steps.finished_at, (f.detected_at for f in failures), (e.at for e in evaluations))
    stop_at = max(worked, default=attempt.ended_at) if attempt.ending else attempt.ended_at
    yield Span(stop_at, attempt.ended_at, "shutdown")
    yield from _changes(failures, generations, steps, stop_at)


def _changes(
    failures: Sequence[FailureDetected], generations: Sequence[GenerationStarted], steps: _Steps, stop_at: float
) -> Iterator[Span]:
    """From one generation to the next: the step in flight that is lost, the time to notice, the time to go on."""
    ends: dict[int, float] = {g.index: g.at for g in generations}
    resumes: dict[int, float] = {}
    for generation, begun_at, finished_at in zip(steps.generations, steps.begun_at, steps.finished_at):
        ends[generation] = max(ends.get(generation, -inf), finished_at)
        resumes[generation] = min(resumes.get(generation, inf), begun_at)
    resumed = _Resumed(resumes, stop_at)
    faults: dict[int, float] = {}
    for failure in failures:
        faults[failure.generation] = min(faults.get(failure.generation, inf), failure.at)
    for generation, fault_at in faults.items():
        yield Span(ends.get(generation, fault_at), fault_at, "lost")
    for failure in failures:
        yield Span(failure.at, failure.detected_at, "detection")
        yield Span(failure.detected_at, resumed.after(failure.generation), "recovery")
    failed = sorted(faults)
    for before, after in pairwise(generations):
        first = bisect_left(failed, before.index)
        if first == len(failed) or failed[first] >= after.index:
            yield Span(ends[before.index], resumed.after(before.index), "resize")


class _Resumed:
    """When the run went on after a generation: O(log generations) to ask."""

    def __init__(self, resumes: Mapping[int, float], never: float) -> None:
        self._generations = sorted(resumes)
        from_here = accumulate((resumes[g] for g in reversed(self._generations)), min)
        self._at = [*reversed([*from_here]), never]

    def after(self, generation: int) -> float:
        """The first moment of a step of any later generation; `never` without one."""
        return self._at[bisect_right(self._generations, generation)]
