"""SIGTERM, Ctrl-C and a terminal that is closed ask for a clean stop, the last state made durable.

A second Ctrl-C ends at once. Under `nohup`, which ignores what a closed terminal sends, the run goes on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stop:
    """SIGTERM, SIGHUP and the first Ctrl-C stop the run cleanly; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.told: Callable[[str], None] | None = None
        """Takes the reason of a stop; None while nothing is trained yet: then a stop just ends the attempt."""
        self._holds = 0
        self._held_back = ""

    def install(self) -> None:
        """Take the signals, again whenever others may have taken them, as Ray does when it starts."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._handle)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the block be done whole: a stop that would break it off comes after it. For short work only."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
            if self._held_back and not self._holds:
                reason, self._held_back = self._held_back, ""
                raise KeyboardInterrupt(reason)

    def _handle(self, number: int, _: Any) -> None:
        reason = f"{signal.Signals(number).name} received"
        if self.told is not None:
            self.told(reason)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        elif self._holds:
            self._held_back = reason
        else:
            raise KeyboardInterrupt(reason)


@contextmanager
def stopping() -> Iterator[Stop]:
    """Handle the signals until the block ends."""
    stop = Stop()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    stop.install()
    try:
        yield stop
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
