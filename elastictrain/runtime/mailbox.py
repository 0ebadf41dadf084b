"""Numbered events that one side appends and the other reads by long poll: nothing is lost, nothing seen twice."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Thread-safe. The reader names the number of the last event it has; older ones are then forgotten."""

    def __init__(self) -> None:
        self._events: deque[tuple[int, T]] = deque()
        self._number = 0
        self._changed = threading.Condition()

    def put(self, event: T) -> None:
        """Append an event and wake the reader."""
        with self._changed:
            self._number += 1
            self._events.append((self._number, event))
            self._changed.notify_all()

    def read(self, after: int, timeout_s: float = 0.0) -> list[tuple[int, T]]:
        """The events numbered above `after`, waiting for the first of them at most `timeout_s`."""
        with self._changed:
            while self._events and self._events[0][0] <= after:
                self._events.popleft()
            self._changed.wait_for(lambda: bool(self._events), timeout_s)
            return list(self._events)
