"""Which committed steps stand, which were undone by a roll-back, and which checkpoints belong to them (pure).

A generation that starts at step f begins from the state after f - 1 steps: whatever was committed from f on is no
longer part of the run. Everything that speaks of "the run's steps" folds through here. O(events).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import cast

from elastictrain.events import CheckpointRemoved, CheckpointWritten, Event, GenerationStarted, StepCommitted
from elastictrain.state.manifest import Manifest
from elastictrain.tracking.event_log import View
from elastictrain.tracking.step_times import StepTime, times


@dataclass(frozen=True, slots=True)
class Committed:
    """The steps in step order, and those that a roll-back took away; by their places among the events."""

    standing: View[StepCommitted]
    undone: View[StepCommitted]
    by_step: Mapping[int, StepCommitted]
    """Those that stand, in step order."""


class _ByStep(Mapping[int, StepCommitted]):
    """Looks a step up in O(log steps), and holds no copy of it."""

    def __init__(self, numbers: Sequence[int], steps: Sequence[StepCommitted]) -> None:
        self._numbers, self._steps = numbers, steps

    def __getitem__(self, step: int) -> StepCommitted:
        at = bisect_left(self._numbers, step)
        if at == len(self._numbers) or self._numbers[at] != step:
            raise KeyError(step)
        return self._steps[at]

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


def committed_steps(events: Sequence[Event]) -> Committed:
    """Fold the events, in journal order; 16 bytes a step. Of a view, the places are those in what it views."""
    standing, steps = array("q"), array("q")
    undone = array("q")

    def roll_back(first_step: int) -> None:
        while steps and steps[-1] >= first_step:
            steps.pop()
            undone.append(standing.pop())

    whole, places = (events.whole, events.places) if isinstance(events, View) else (events, range(len(events)))
    for place, event in zip(places, times(events)):
        if isinstance(event, GenerationStarted):
            roll_back(event.first_step)
        elif isinstance(event, StepTime):
            roll_back(event.step)
            standing.append(place)
            steps.append(event.step)
    of_steps = cast(Sequence[StepCommitted], whole)
    stand = View(of_steps, standing)
    return Committed(stand, View(of_steps, undone), _ByStep(steps, stand))


def written_checkpoints(events: Iterable[Event]) -> dict[int, str]:
    """SHA-256 of the manifest of each checkpoint that was written and not removed, by step."""
    found: dict[int, str] = {}
    for event in events:
        if isinstance(event, CheckpointWritten):
            found[event.step] = event.sha256
        elif isinstance(event, CheckpointRemoved):
            found.pop(event.step, None)
    return found


def doubt(events: Sequence[Event], manifest: Manifest) -> str:
    """What speaks against a checkpoint that no event tells of being this run's; "" when nothing does.

    The events know each step's loss to the last bit, and the hash over all samples up to it.
    """
    step = committed_steps(events).by_step.get(manifest.step)
    if step is None:
        return f"the run has not come to step {manifest.step}"
    loss = step.loss if isfinite(step.loss) else nan  # the manifest knows no infinity
    if (repr(loss), step.sample_chain) != (repr(manifest.loss), manifest.sample_chain):  # repr: NaN is NaN
        return f"it is not the run's step {manifest.step}: its loss or its samples differ"
    return ""
