"""Who lays claim to which part of a run's time (pure): the events of an attempt as spans, for the ledger to cut.

A span says "from here to there it was this". Spans overlap, and the ledger gives each moment to the strongest claim,
in the order of `CLAIMS`. A step is one claim, which the ledger divides by what its ranks waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import inf
from typing import NamedTuple

from elastictrain.events import (
    DRIVER_LOST,
    Evaluated,
    FailureDetected,
    GenerationStarted,
    StepCommitted,
)
from elastictrain.tracking.attempts import Attempt

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
    step: StepCommitted | None = None
    """Of a claim of a step that stands."""


def claims_of(attempt: Attempt, undone: set[int]) -> Iterator[Span]:
    """Every claim of one attempt's events on its time; `undone` has the ids of the steps that did not stay."""
    steps = [e for e in attempt.events if isinstance(e, StepCommitted)]
    failures = [e for e in attempt.events if isinstance(e, FailureDetected) and e.kind != DRIVER_LOST]  # that is `down`
    generations = [e for e in attempt.events if isinstance(e, GenerationStarted)]
    evaluations = [e for e in attempt.events if isinstance(e, Evaluated)]
    first_step_at = min((s.begun_at for s in steps), default=attempt.ended_at)
    yield Span(attempt.begun_at, first_step_at, "startup")
    for step in steps:
        if id(step) in undone:
            yield Span(step.begun_at, step.finished_at, "lost")
        else:
            yield Span(step.begun_at, step.finished_at, "step", step)
    busy = [s.finished_at for s in steps] + [g.at for g in generations]
    for evaluation in evaluations:
        begun_at = max((t for t in busy if t <= evaluation.at), default=evaluation.at)
        yield Span(begun_at, evaluation.at, "evaluation")
    worked = [s.finished_at for s in steps] + [f.detected_at for f in failures] + [e.at for e in evaluations]
    stop_at = max(worked, default=attempt.ended_at) if attempt.ending else attempt.ended_at
    yield Span(stop_at, attempt.ended_at, "shutdown")
    yield from _changes(failures, generations, steps, stop_at)


def _changes(
    failures: Sequence[FailureDetected],
    generations: Sequence[GenerationStarted],
    steps: Sequence[StepCommitted],
    stop_at: float,
) -> Iterator[Span]:
    """From one generation to the next: the step in flight that is lost, the time to notice, the time to go on."""
    ends: dict[int, float] = {g.index: g.at for g in generations}
    resumes: dict[int, float] = {}
    for step in steps:
        ends[step.generation] = max(ends.get(step.generation, -inf), step.finished_at)
        resumes[step.generation] = min(resumes.get(step.generation, inf), step.begun_at)

    def resumed_after(generation: int) -> float:
        return min((at for g, at in resumes.items() if g > generation), default=stop_at)

    faults: dict[int, float] = {}
    for failure in failures:
        faults[failure.generation] = min(faults.get(failure.generation, inf), failure.at)
    for generation, fault_at in faults.items():
        yield Span(ends.get(generation, fault_at), fault_at, "lost")
    for failure in failures:
        yield Span(failure.at, failure.detected_at, "detection")
        yield Span(failure.detected_at, resumed_after(failure.generation), "recovery")
    for before, after in pairwise(generations):
        if not any(before.index <= failed < after.index for failed in faults):
            yield Span(ends[before.index], resumed_after(before.index), "resize")
