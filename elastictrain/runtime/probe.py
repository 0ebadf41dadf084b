"""Asking nodes whether they are there, without waiting for Ray to find out: a connection to the raylet's port.

A port that nobody listens on any more refuses within a millisecond, while Ray takes a second or more to tell that a
node is dead. A node that is cut off or without power says nothing: that is believed after `TIMEOUT_S`.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

TIMEOUT_S = 2.0
_AT_ONCE = 32

Address = tuple[str, int]


def answers(address: Address, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether somebody listens there; False when refused, or silent for `timeout_s`."""
    try:
        socket.create_connection(address, timeout=timeout_s).close()
    except OSError:
        return False
    return True


class Probe:
    """Asks many nodes at once; `silent` gives those that turned out not to answer since the last call."""

    def __init__(self, nodes: Mapping[str, Address]) -> None:
        self._pool = ThreadPoolExecutor(max_workers=_AT_ONCE, thread_name_prefix="probe")
        self._waiting: dict[Future[bool], str] = {self._pool.submit(answers, at): name for name, at in nodes.items()}

    def silent(self) -> Iterable[str]:
        """Names of nodes that do not answer, each once."""
        done = [future for future in self._waiting if future.done()]
        return [name for future in done if (name := self._waiting.pop(future)) and not future.result()]

    @property
    def done(self) -> bool:
        """Whether all have been asked and told."""
        return not self._waiting

    def close(self) -> None:
        """Forget about the rest."""
        self._pool.shutdown(wait=False, cancel_futures=True)
