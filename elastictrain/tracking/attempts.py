"""The attempts at a run, and the time in which each one's process was there (pure). O(events)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from elastictrain.events import Event, FailureDetected, GenerationStarted, RunEnded, RunStarted, StepCommitted
from elastictrain.tracking.event_log import View
from elastictrain.tracking.step_times import StepTime, TimedEvent, times


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt's events, and the time in which its process was there."""

    events: View[Event]
    """By their places among all events."""
    others: Sequence[Event]
    """Those of them that are no committed steps."""
    begun_at: float
    ended_at: float
    ending: RunEnded | None
    """How it ended; None when it was cut off, or runs still."""


def split_attempts(events: Sequence[Event], now: float | None = None) -> list[Attempt]:
    """The attempts in order. With `now`, an unended last attempt is taken to be running at that time.

    A step that is told before an attempt's first generation was done in an earlier one, whose driver did not live to
    tell: it counts there.
    """
    groups: list[array[int]] = []
    others: list[list[Event]] = []
    begun_at: list[float] = []
    ended_at: list[float] = []
    endings: list[RunEnded | None] = []
    trained = 0
    for place, event in enumerate(times(events)):
        if isinstance(event, RunStarted):
            groups.append(array("q"))
            others.append([])
            begun_at.append(event.at)
            ended_at.append(event.at)
            endings.append(None)
        elif isinstance(event, GenerationStarted):
            trained = len(groups) - 1
        if groups:
            group = trained if isinstance(event, StepTime) else -1
            groups[group].append(place)
            ended_at[group] = max(ended_at[group], latest(event))
            if not isinstance(event, StepTime):
                others[group].append(event)
            if isinstance(event, RunEnded):
                endings[group] = event
    if now is not None and groups and endings[-1] is None:
        ended_at[-1] = max(ended_at[-1], now)
    clocks = zip(begun_at, ended_at, endings)
    return [Attempt(View(events, g), o, *rest) for g, o, rest in zip(groups, others, clocks)]


def latest(event: TimedEvent) -> float:
    """The latest moment that it tells of."""
    if isinstance(event, StepTime | StepCommitted):
        return max(event.at, event.finished_at)
    return max(event.at, event.detected_at) if isinstance(event, FailureDetected) else event.at
