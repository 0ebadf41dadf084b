"""Which committed steps stand, which were undone by a roll-back, and which checkpoints belong to them (pure).

A generation that starts at step f begins from the state after f - 1 steps: whatever was committed from f on is no
longer part of the run. Everything that speaks of "the run's steps" folds through here. O(events).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite, nan

from elastictrain.events import CheckpointRemoved, CheckpointWritten, Event, GenerationStarted, StepCommitted
from elastictrain.state.manifest import Manifest


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


def written_checkpoints(events: Iterable[Event]) -> dict[int, str]:
    """SHA-256 of the manifest of each checkpoint that was written and not removed, by step."""
    found: dict[int, str] = {}
    for event in events:
        if isinstance(event, CheckpointWritten):
            found[event.step] = event.sha256
        elif isinstance(event, CheckpointRemoved):
            found.pop(event.step, None)
    return found


def doubt(events: Iterable[Event], manifest: Manifest) -> str:
    """What speaks against a checkpoint that no event tells of being this run's; "" when nothing does.

    The events know each step's loss to the last bit, and the hash over all samples up to it.
    """
    step = next((s for s in reversed(committed_steps(events).standing) if s.step == manifest.step), None)
    if step is None:
        return f"the run has not come to step {manifest.step}"
    loss = step.loss if isfinite(step.loss) else nan  # the manifest knows no infinity
    if (repr(loss), step.sample_chain) != (repr(manifest.loss), manifest.sample_chain):  # repr: NaN is NaN
        return f"it is not the run's step {manifest.step}: its loss or its samples differ"
    return ""
