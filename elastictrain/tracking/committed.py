"""Which committed steps stand, and which were undone by a roll-back (pure).

A generation that starts at step f begins from the state after f - 1 steps: whatever was committed from f on is no
longer part of the run. Everything that speaks of "the run's steps" folds through here. O(events).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from elastictrain.events import Event, GenerationStarted, StepCommitted


@dataclass(frozen=True, slots=True)
class Committed:
    """The steps in step order, and those that a roll-back took away."""

    standing: tuple[StepCommitted, ...]
    undone: tuple[StepCommitted, ...]


def committed_steps(events: Iterable[Event]) -> Committed:
    """Fold the events, in journal order."""
    standing: list[StepCommitted] = []
    undone: list[StepCommitted] = []

    def roll_back(first_step: int) -> None:
        while standing and standing[-1].step >= first_step:
            undone.append(standing.pop())

    for event in events:
        if isinstance(event, GenerationStarted):
            roll_back(event.first_step)
        elif isinstance(event, StepCommitted):
            roll_back(event.step)
            standing.append(event)
    return Committed(tuple(standing), tuple(undone))
