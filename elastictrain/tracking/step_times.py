"""What folds over time need of a committed step: nine numbers, read from a packed log at a fifth of the cost of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from elastictrain.events import Event, StepCommitted, Waits
from elastictrain.tracking.event_log import EventLog, View


class StepTime(NamedTuple):
    """Of a `StepCommitted`, its fields by the same names, and its `Waits`."""

    generation: int
    step: int
    at: float
    begun_at: float
    finished_at: float
    snapshot_stall_s: float
    data_s: float
    peers_s: float
    snapshot_s: float


TimedEvent: TypeAlias = Event | StepTime
"""A committed step is a `StepTime`, never a `StepCommitted`."""


def times(events: Sequence[Event]) -> Iterator[TimedEvent]:
    """The events in order, with the times of the committed steps in place of these."""
    if isinstance(events, View):
        return map(timer(events.whole), events.places)
    return map(timer(events), range(len(events)))


def timer(events: Sequence[Event]) -> Callable[[int], TimedEvent]:
    """Looks one of them up by its place."""
    if not isinstance(events, EventLog):
        return lambda place: _time_of(events[place])

    def look(place: int) -> TimedEvent:
        found = events.time_at(place)
        return StepTime._make(found) if isinstance(found, tuple) else _time_of(found)

    return look


def waits_of(step: StepCommitted) -> Waits:
    """What the step's ranks waited for; from the longest waits where nothing else was told."""
    return step.waits or Waits(step.data_wait_s, 0.0, step.snapshot_stall_s)


def _time_of(event: Event) -> TimedEvent:
    if not isinstance(event, StepCommitted):
        return event
    waits = waits_of(event)
    return StepTime(
        event.generation, event.step, event.at, event.begun_at, event.finished_at, event.snapshot_stall_s,
        waits.data_s, waits.peers_s, waits.snapshot_s,
    )  # fmt: skip
