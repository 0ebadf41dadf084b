"""Replies that are waited for, each with what to do about it: the supervisor's only way to wait.

Ray hands each reply over when it comes, in a thread of its own; asking `ray.wait` again and again for all that are
outstanding costs half a millisecond each time.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ray.exceptions import RayError

Take = Callable[[Any], None]
Fail = Callable[[RayError], None]


class Replies:
    """Outstanding Ray calls. Handlers run on the caller of `wait`, one at a time, in order of arrival."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[tuple[Future[Any], Take, Fail]] = queue.SimpleQueue()

    def expect(self, reply: Any, take: Take, fail: Fail) -> None:
        """Call `take(value)` when this reply is there, or `fail(error)` when it never will be."""
        reply.future().add_done_callback(lambda future: self._arrived.put((future, take, fail)))

    def wait(self, timeout_s: float) -> None:
        """Handle what has arrived; wait at most so long for the first."""
        try:
            arrived = self._arrived.get(timeout=timeout_s)
        except queue.Empty:
            return
        while True:
            self._handle(*arrived)
            try:
                arrived = self._arrived.get_nowait()
            except queue.Empty:
                return

    def _handle(self, future: Future[Any], take: Take, fail: Fail) -> None:
        try:
            value = future.result()
        except RayError as error:
            fail(error)
        else:
            take(value)
