"""The ledger of a run that goes on, in memory that does not grow with its steps (pure).

It counts what is old enough for good, up to a moment in time, and keeps of the steps before that moment the few that
later claims need: the first to begin and the last to end of each generation. What is kept are the last some thousand
steps, and of everything else that can claim time the bare facts: 300 bytes a failure.

Now and then something is told of a time that is counted: a roll-back goes far behind, or a checkpoint is told of late.
Then it asks for the whole history once, and counts anew. So the ledger is always the one of `ledger.goodput`, to the
microsecond; but a step that is cut at that moment may have a microsecond of its waits rounded the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from math import inf
from operator import itemgetter

from elastictrain.events import (
    DRIVER_LOST,
    Cause,
    CheckpointWritten,
    Evaluated,
    Event,
    FailureDetected,
    GenerationStarted,
    RunEnded,
    RunStarted,
    SlotsHeld,
    StepCommitted,
    WorkerStarted,
)
from elastictrain.tracking.attempts import latest
from elastictrain.tracking.event_log import EventLog
from elastictrain.tracking.ledger import Goodput, goodput, since, total

MOST_STEPS = 2_000
"""Kept at a time: what is behind the half of them is counted for good."""

_CLAIMING = (
    RunStarted,
    SlotsHeld,
    GenerationStarted,
    StepCommitted,
    FailureDetected,
    CheckpointWritten,
    Evaluated,
    RunEnded,
)


class RunningLedger:
    """The fold. `add` costs little; `goodput` some milliseconds, as long as nothing has to be counted anew."""

    def __init__(self, history: Callable[[], Iterable[Event]], most_steps: int = MOST_STEPS) -> None:
        """`history` gives the run's events from the first on, at least as many as were added; it is seldom asked."""
        self._history, self._most_steps, self._steps_limit = history, most_steps, 32 * most_steps
        self._added = 0
        self._kept: list[Event] | EventLog = []
        self._num_steps = 0
        """Of those kept, that are not counted yet."""
        self._latest: list[float] = []
        """When the last event of each attempt was."""
        self._trained = 0
        """Which attempt a step belongs to."""
        self._counted: Goodput | None = None
        self._until = 0.0
        """Up to this time all is counted."""
        self._counted_step = self._counted_generation = 0
        """The highest of which something is counted."""
        self._stale = False

    @property
    def num_added(self) -> int:
        """Events that it was given."""
        return self._added

    @property
    def num_kept(self) -> int:
        """Events in memory."""
        return len(self._kept)

    def add(self, event: Event) -> None:
        """Take in the next event."""
        self._added += 1
        if self._stale:
            return
        if self._counted is not None and self._contradicts(event):
            self._stale, self._kept = True, []
            return
        self._take(event)
        if self._num_steps > self._most_steps:
            self._count()

    def goodput(self, now: float | None = None) -> Goodput:
        """The ledger up to the last event or, for a run that goes on, to `now`."""
        if self._stale:
            self._begin_anew()
        events = EventLog(self._events())
        return (
            goodput(events, now) if self._counted is None else total([self._counted, since(events, self._until, now)])
        )

    def _take(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._latest.append(event.at)
            case GenerationStarted():
                self._trained = len(self._latest) - 1
            case StepCommitted():
                self._num_steps += 1
        if self._latest:
            attempt = self._trained if isinstance(event, StepCommitted) else -1
            self._latest[attempt] = max(self._latest[attempt], latest(event))
        if isinstance(event, _CLAIMING):
            self._kept.append(_bare(event))

    def _events(self) -> Iterator[Event]:
        """What is kept; what is not, as its attempt's last word."""
        ends = iter(self._latest)
        for event in self._kept:
            yield event
            if isinstance(event, RunStarted):
                yield WorkerStarted(next(ends), "", "", 0, 0.0)

    def _contradicts(self, event: Event) -> bool:
        """Whether it says something of a time that is counted."""
        match event:
            case StepCommitted():
                newer = event.step > self._counted_step and event.generation >= self._counted_generation
                return not newer or min(event.begun_at, event.finished_at) < self._until
            case GenerationStarted():
                newer = event.first_step > self._counted_step and event.index > self._counted_generation
                first = not any(isinstance(e, GenerationStarted) for e in self._kept)
                return not newer or first or event.at < self._until
            case CheckpointWritten():
                return event.step < self._counted_step
            case FailureDetected() if event.kind != DRIVER_LOST:
                return event.generation < self._counted_generation or min(event.at, event.detected_at) < self._until
            case Evaluated():
                ends = (e.finished_at if isinstance(e, StepCommitted) else e.at for e in self._kept)
                return max((at for at in ends if at <= event.at), default=event.at) < self._until
            case RunStarted() | RunEnded() | SlotsHeld():
                return event.at < self._until
        return False

    def _count(self) -> None:
        """Count for good what is behind the newer half of the steps."""
        begun = [e.begun_at for e in self._kept if isinstance(e, StepCommitted) and e.finished_at > self._until]
        until = min(begun[-self._most_steps // 2 :])
        events = EventLog(self._events())
        start = self._until if self._counted else next((e.at for e in events if isinstance(e, RunStarted)), until)
        if not start < until <= max(self._latest, default=until):
            self._most_steps *= 2  # their times are no time line
            return
        new = since(events, start, until=until)
        self._counted = total([self._counted, new]) if self._counted else new
        self._until = until
        self._keep(self._kept)

    def _keep(self, events: Iterable[Event]) -> None:
        """Only what the claims on the time that is not counted may need, in their order."""
        kept: list[tuple[int, Event]] = []
        first: dict[int, tuple[int, StepCommitted]] = {}
        last: dict[int, tuple[int, StepCommitted]] = {}
        oldest, generation, self._num_steps = inf, self._counted_generation, 0
        for number, event in enumerate(events):
            if not isinstance(event, StepCommitted):
                if isinstance(event, _CLAIMING):
                    kept.append((number, _bare(event)))
                if isinstance(event, GenerationStarted) and event.at < self._until:
                    generation = max(generation, event.index)
                continue
            if event.begun_at < self._until:
                self._counted_step = max(self._counted_step, event.step)
                generation = max(generation, event.generation)
            if event.finished_at > self._until:
                kept.append((number, event))
                self._num_steps += 1
                oldest = min(oldest, event.step)
                continue
            index = event.generation
            if index not in first or event.begun_at < first[index][1].begun_at:
                first[index] = number, event
            if index not in last or event.finished_at > last[index][1].finished_at:
                last[index] = number, event
        self._counted_generation = generation
        ends = dict([*first.values(), *last.values()])
        kept = [(n, e) for n, e in kept if not isinstance(e, CheckpointWritten) or e.step >= oldest - 1]
        self._kept = [event for _, event in sorted([*kept, *ends.items()], key=itemgetter(0))]

    def _begin_anew(self) -> None:
        """Fold the history: what was wrong about what is counted is known now."""
        self._most_steps = min(2 * self._most_steps, self._steps_limit)
        self._kept, self._num_steps, self._latest, self._trained = EventLog(), 0, [], 0
        self._counted, self._until, self._counted_step, self._counted_generation = None, 0.0, 0, 0
        self._stale = False
        for event in islice(self._history(), self._added):
            self._take(event)
        if self._num_steps > self._most_steps:
            self._count()


def _bare(event: Event) -> Event:
    """Without what no claim needs."""
    match event:
        case RunStarted():
            return replace(event, config={}, environment={})
        case GenerationStarted():
            return replace(event, layout={}, cause="", members=(), phases_s={})
        case FailureDetected():
            return replace(event, cause=Cause("", ""))
    return event
