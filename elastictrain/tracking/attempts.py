"""The attempts at a run, and the time in which each one's process was there (pure). O(events)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from elastictrain.events import Event, FailureDetected, GenerationStarted, RunEnded, RunStarted, StepCommitted


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt's events, and the time in which its process was there."""

    events: tuple[Event, ...]
    begun_at: float
    ended_at: float

    @property
    def ending(self) -> RunEnded | None:
        """How it ended; None when it was cut off, or runs still."""
        return next((e for e in reversed(self.events) if isinstance(e, RunEnded)), None)


def split_attempts(events: Iterable[Event], now: float | None = None) -> list[Attempt]:
    """The attempts in order. With `now`, an unended last attempt is taken to be running at that time.

    A step that is told before an attempt's first generation was done in an earlier one, whose driver did not live to
    tell: it counts there.
    """
    groups: list[list[Event]] = []
    trained = 0
    for event in events:
        if isinstance(event, RunStarted):
            groups.append([])
        elif isinstance(event, GenerationStarted):
            trained = len(groups) - 1
        if groups:
            groups[trained if isinstance(event, StepCommitted) else -1].append(event)
    attempts = [Attempt(tuple(g), g[0].at, max(_latest(e) for e in g)) for g in groups]
    if now is not None and attempts and attempts[-1].ending is None:
        last = attempts[-1]
        attempts[-1] = Attempt(last.events, last.begun_at, max(last.ended_at, now))
    return attempts


def _latest(event: Event) -> float:
    if isinstance(event, StepCommitted):
        return max(event.at, event.finished_at)
    return max(event.at, event.detected_at) if isinstance(event, FailureDetected) else event.at
