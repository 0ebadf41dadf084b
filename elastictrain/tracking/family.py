"""The checkpoints of a run and what each came from (pure): a fold over the events, in journal order.

A checkpoint's parent is the newest one before it that the state went through: after a roll-back to step 50, what was
written at step 100 before is no ancestor of what is written at step 120. The best is the one with the lowest loss on
held-out text where any was evaluated, else with the lowest training loss; only those that are still there count.
O(1) an event, but for the best: O(checkpoints).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import inf, isfinite

from elastictrain.events import (
    CheckpointRejected,
    CheckpointRemoved,
    CheckpointWritten,
    Evaluated,
    Event,
    GenerationStarted,
    RunStarted,
)


@dataclass(frozen=True, slots=True)
class Kin:
    """One durable checkpoint, and its place among the others."""

    written: CheckpointWritten
    parent: str
    """URI of the checkpoint before it, or of the one of another run that it is a copy of; "" where there is none."""
    attempt: int
    generation: int
    """The one that did its step; -1 where the events do not tell of it."""
    evaluated: Evaluated | None = None
    removed: bool = False
    rejected: str = ""
    """Why it was not loaded, or may not be; "" where nothing speaks against it."""

    @property
    def usable(self) -> bool:
        """Whether it is there, and trusted."""
        return not self.removed and not self.rejected


class Family:
    """All checkpoints of a run, by URI, in the order in which they were first written."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.members: dict[str, Kin] = {}
        self._line: list[str] = []
        """From the first to the newest checkpoint that the state went through."""
        self._attempt = 0
        self._generations: list[tuple[int, int]] = []
        """Index and first step, of those whose steps stand."""
        for event in events:
            self.add(event)

    def add(self, event: Event) -> list[str]:
        """Take in one event; the URIs of which something changed, but for which is best and last."""
        match event:
            case RunStarted():
                self._attempt = event.attempt
            case GenerationStarted():
                standing = [(index, first) for index, first in self._generations if first < event.first_step]
                self._generations = [*standing, (event.index, event.first_step)]
                undone = [uri for uri in self._line if self._step(uri) >= event.first_step]
                self._line = self._line[: len(self._line) - len(undone)]
                return undone
            case CheckpointWritten():
                return [self._write(event)]
            case CheckpointRemoved() if event.uri in self.members:
                return self._change(event.uri, replace(self.members[event.uri], removed=True))
            case CheckpointRejected() if event.uri in self.members:
                return self._change(event.uri, replace(self.members[event.uri], rejected=event.problem))
            case Evaluated():
                newest = next((k for k in self._newest_first() if k.usable and k.written.step == event.step), None)
                if newest is not None:
                    return self._change(newest.written.uri, replace(newest, evaluated=event))
        return []

    @property
    def last(self) -> str:
        """URI of the newest usable checkpoint that the state went through; "" where there is none."""
        return next((uri for uri in reversed(self._line) if self.members[uri].usable), "")

    @property
    def best(self) -> str:
        """URI of the best usable checkpoint; "" where there is none."""
        usable = [kin for kin in self.members.values() if kin.usable]
        evaluated = [kin for kin in usable if kin.evaluated is not None]
        best = min(evaluated or usable, key=_loss, default=None)
        return best.written.uri if best else ""

    def _write(self, event: CheckpointWritten) -> str:
        line = [uri for uri in self._line if uri != event.uri and self._step(uri) < event.step]
        later = [uri for uri in self._line if uri != event.uri and self._step(uri) > event.step]
        parent = line[-1] if line else event.origin
        generation = next((index for index, first in reversed(self._generations) if first <= event.step), -1)
        self.members[event.uri] = Kin(event, parent, self._attempt, generation)
        self._line = [*line, event.uri, *later]
        return event.uri

    def _change(self, uri: str, changed: Kin) -> list[str]:
        self.members[uri] = changed
        return [uri]

    def _step(self, uri: str) -> int:
        return self.members[uri].written.step

    def _newest_first(self) -> Iterable[Kin]:
        return reversed(self.members.values())


def _loss(kin: Kin) -> float:
    loss = kin.evaluated.loss if kin.evaluated else kin.written.loss
    return loss if isfinite(loss) else inf
