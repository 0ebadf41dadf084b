"""How long it is since anybody in charge was heard of, and what happens when that is too long.

A keeper outlives its driver, so that the next one finds the state in its memory; but not for ever. Work that is under
way for the driver (a durable write may take long) counts as hearing of it. One thread, which sleeps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Lifeline:
    """Calls `end` once, from its thread, when nothing was heard for `timeout_s`."""

    def __init__(self, timeout_s: float, end: Callable[[], None]) -> None:
        self._timeout_s, self._end = timeout_s, end
        self._changed = threading.Condition()
        self._heard = time.monotonic()
        self._busy = 0
        threading.Thread(target=self._wait, name="lifeline", daemon=True).start()

    @property
    def silent_s(self) -> float:
        """Since something was heard."""
        return time.monotonic() - self._heard

    def hear(self) -> None:
        """Somebody in charge is there."""
        self._heard = time.monotonic()

    def extend(self, timeout_s: float) -> None:
        """Have this patience from now on."""
        with self._changed:
            self._timeout_s, self._heard = timeout_s, time.monotonic()
            self._changed.notify()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Nothing ends while the block runs, nor for a whole patience after it."""
        with self._changed:
            self._busy += 1
        try:
            yield
        finally:
            with self._changed:
                self._busy -= 1
                self._heard = time.monotonic()

    def _wait(self) -> None:
        with self._changed:
            while (left_s := self._timeout_s - (0.0 if self._busy else self.silent_s)) > 0:
                self._changed.wait(left_s)
        self._end()
