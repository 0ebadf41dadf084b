"""Replies that are waited for, each with what to do about it: the supervisor's only way to wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

Take = Callable[[Any], None]


class Replies:
    """Outstanding Ray calls. Handlers run on the caller of `wait`, one at a time, in order of arrival."""

    def __init__(self) -> None:
        self._waiting: dict[Any, tuple[Take, Callable[[RayError], None]]] = {}

    def expect(self, reply: Any, take: Take, fail: Callable[[RayError], None]) -> None:
        """Call `take(value)` when this reply is there, or `fail(error)` when it never will be."""
        self._waiting[reply] = take, fail

    def wait(self, timeout_s: float) -> None:
        """Handle what has arrived; wait at most so long for the first."""
        if not self._waiting:
            return
        ready, _ = ray.wait(list(self._waiting), num_returns=1, timeout=timeout_s, fetch_local=False)
        while ready:
            for reply in ready:
                take, fail = self._waiting.pop(reply)
                try:
                    value = ray.get(reply)
                except RayError as error:
                    fail(error)
                else:
                    take(value)
            if not self._waiting:
                return
            ready, _ = ray.wait(list(self._waiting), num_returns=1, timeout=0, fetch_local=False)
