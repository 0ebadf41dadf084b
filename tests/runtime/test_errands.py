"""What Ray's head is asked for on the side: in order, and what fails is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from elastictrain.runtime.errands import Errands


def failing(message: str) -> Callable[[], None]:
    def call() -> None:
        raise RuntimeError(message)

    return call


def test_what_fails_and_nobody_waits_for_is_told_once() -> None:
    errands, done = Errands(), list[int]()
    errands.do("end an actor", lambda: done.append(1))
    errands.do("give back a slot", failing("it is gone\nat line 3"))
    with pytest.raises(RuntimeError, match="nobody knows"):
        errands.ask(failing("nobody knows")).result(10)
    assert errands.ask(lambda: done.append(2)).result(10) is None
    assert done == [1, 2]
    assert list(errands.take_failures()) == ["can't give back a slot: it is gone"]
    assert list(errands.take_failures()) == []
