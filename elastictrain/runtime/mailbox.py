"""Numbered events that one side appends and the other reads by long poll: nothing is lost, nothing seen twice.

An event that is not urgent may wait a little for others, so that many of them make few answers.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Thread-safe. The reader names the number of the last event it has; older ones are then forgotten."""

    def __init__(self) -> None:
        self._events: deque[tuple[int, T]] = deque()
        self._number = self._urgent = 0
        self._changed = threading.Condition()

    def put(self, event: T, *, urgent: bool = True) -> None:
        """Append an event and wake the reader."""
        with self._changed:
            self._number += 1
            self._urgent = self._number if urgent else self._urgent
            self._events.append((self._number, event))
            self._changed.notify_all()

    def read(self, after: int, timeout_s: float = 0.0, gather_s: float = 0.0) -> list[tuple[int, T]]:
        """The events numbered above `after`, waiting for the first of them at most `timeout_s`.

        When none of them is urgent, wait `gather_s` more, or until one is.
        """
        with self._changed:
            while self._events and self._events[0][0] <= after:
                self._events.popleft()
            if self._changed.wait_for(lambda: bool(self._events), timeout_s) and gather_s:
                self._changed.wait_for(lambda: self._urgent > after, gather_s)
            return list(self._events)
