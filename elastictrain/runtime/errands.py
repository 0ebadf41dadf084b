"""Calls to the head of the Ray cluster, in a thread of their own: without the head each of them blocks for a minute.

Ray ends the process then. So the supervisor asks the head for nothing that it would have to wait for itself: while the
head is silent the calls pile up here, and when it is gone for good the run saves what it has and ends before that.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Errands:
    """One after the other, in the order in which they were given. The thread ends with the process."""

    def __init__(self) -> None:
        self._given: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="errands", daemon=True).start()

    def run(self, call: Callable[[], Any]) -> Future[Any]:
        """Have it called; the future has what it returns or raises."""
        future: Future[Any] = Future()
        self._given.put((call, future))
        return future

    def _run(self) -> None:
        while True:
            call, future = self._given.get()
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - whoever looks at the future has it raised
                future.set_exception(error)
