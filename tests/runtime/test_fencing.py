"""Who does not leave a generation that is given up is ended: soon where it is stuck in a collective."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from elastictrain.control.vocabulary import Fence
from elastictrain.events import Cause
from elastictrain.runtime import fencing
from elastictrain.runtime.board import Progress
from elastictrain.runtime.fencing import Fencing

COMPUTES = Progress(generation=3, step=7, phase="backward", at=0.0, marks=20, waits=40)
WAITS = replace(COMPUTES, waiting=True)


class Fenced:
    """A fence of two workers, of whom nobody answers."""

    def __init__(self) -> None:
        self.lost: list[tuple[str, Cause]] = []
        self.told: dict[str, Progress] = {}
        fleet: Any = SimpleNamespace(workers={"a": None, "b": None}, nodes={})
        silent: Any = SimpleNamespace(ask=lambda *_: None, insist=lambda: None)
        ignore: Any = lambda *_: None  # noqa: E731 - for all that is not asked here
        self.fencing = Fencing(
            order=Fence(4, ("a", "b"), {}),
            fleet=fleet,
            replies=silent,
            questions=silent,
            quiet_timeout_s=60.0,
            lose_worker=self.lose,
            suspect=ignore,
            lose_node=ignore,
            hear=ignore,
            held=ignore,
            progress=self.told,
            done=ignore,
        )
        self.fencing.start()

    def lose(self, name: str, cause: Cause) -> None:
        self.lost.append((name, cause))
        self.fencing.forget_worker(name)

    def look(self, **told: Progress) -> None:
        """The keepers have told this since the last look."""
        self.told.update(told)
        self.fencing.check()


@pytest.fixture
def fenced(monkeypatch: pytest.MonkeyPatch) -> Fenced:
    monkeypatch.setattr(fencing, "STUCK_S", 0.0)
    found = Fenced()
    time.sleep(0.001)
    return found


def test_who_is_stuck_in_a_collective_is_ended_long_before_the_deadline(fenced: Fenced) -> None:
    fenced.look(a=WAITS, b=COMPUTES)
    fenced.look()  # nothing new: it may have left since
    assert fenced.lost == []
    fenced.look(a=replace(WAITS), b=replace(COMPUTES))
    [(name, cause)] = fenced.lost
    assert (name, cause.kind) == ("a", "hang")
    assert "stuck in a collective" in cause.message


def test_who_goes_through_collectives_or_has_left_the_generation_is_not(fenced: Fenced) -> None:
    fenced.look(a=WAITS, b=replace(WAITS, generation=4))
    fenced.look(a=replace(WAITS, waits=41), b=replace(WAITS, generation=4))
    fenced.look(a=replace(COMPUTES, waits=41))
    fenced.look(a=replace(WAITS, waits=42))
    assert fenced.lost == []
