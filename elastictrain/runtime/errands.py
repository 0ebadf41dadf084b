"""Calls to the head of the Ray cluster, in a thread of their own: without the head each of them blocks for a minute.

Ray ends the process then. So the supervisor asks the head for nothing that it would have to wait for itself: while the
head is silent the calls pile up here, and when it is gone for good the run saves what it has and ends before that.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any


class Errands:
    """One after the other, in the order in which they were given. The thread ends with the process."""

    def __init__(self) -> None:
        self._given: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._failed: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="errands", daemon=True).start()

    def do(self, what: str, call: Callable[[], Any]) -> None:
        """Have it called, and wait for nothing; `what` in words, for `take_failures` to say if it fails."""

        def note(done: Future[Any]) -> None:
            if error := done.exception():
                told = (str(error).splitlines() or [type(error).__name__])[0]
                self._failed.put(f"can't {what}: {told}")

        self.ask(call).add_done_callback(note)

    def take_failures(self) -> Iterator[str]:
        """What was not done, each once."""
        while not self._failed.empty():
            yield self._failed.get()

    def ask(self, call: Callable[[], Any]) -> Future[Any]:
        """Have it called; the future has what it returns or raises, and somebody has to look at it."""
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
