"""SIGTERM and Ctrl-C: the first asks for a clean stop, the last state made durable; a second Ctrl-C ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """SIGTERM and the first Ctrl-C stop the run cleanly; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.told: Callable[[str], None] | None = None
        """Takes the reason of a stop; None while nothing is trained yet: then a stop just ends the attempt."""

    def install(self) -> None:
        """Take the signals, again whenever others may have taken them, as Ray does when it starts."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._handle)

    def _handle(self, number: int, _: Any) -> None:
        reason = f"{signal.Signals(number).name} received"
        if self.told is None:
            raise KeyboardInterrupt(reason)
        self.told(reason)
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def stopping() -> Iterator[Stop]:
    """Handle the signals until the block ends."""
    stop = Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop.install()
    try:
        yield stop
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
