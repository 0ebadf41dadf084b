"""Which updates of a GPU can still be trusted when its collectives are broken.

Gloo raises when a peer is lost. Nccl does not: broken, the kernel that waited ends as if the collective had been done,
and what was enqueued behind it computes with what it left (seen on an H100: the sum of two ranks that one never came
to is the other's own tensor, and nothing raises before the next call). So whoever breaks collectives says so here
first. What the device had done by then is sound; of anything later nobody can tell.

Cost: a lock and a recorded event a step.
"""

from __future__ import annotations

import threading
from typing import Protocol

from elastictrain.errors import PeerLostError


class DeviceEvent(Protocol):
    """Of `torch.cuda.Event` what is needed here."""

    def record(self) -> object:
        """Come true when the device has done what is enqueued by now."""
        ...

    def query(self) -> bool:
        """Whether it has."""
        ...


class UpdateFence:
    """Counts the updates of one rank. The training thread marks, any thread raises the fence, a third one checks."""

    def __init__(self, done: DeviceEvent) -> None:
        self._done = done  # true when the newest update is there
        self._marked = 0
        self._trusted: int | None = None
        self._lock = threading.Lock()

    def mark(self) -> None:
        """One more update is enqueued, all of it; those before are there."""
        with self._lock:
            self._marked += 1
            self._done.record()

    def fence(self) -> None:
        """Before collectives are broken: trust no update that is not there by now. The first time counts."""
        with self._lock:
            if self._trusted is None:
                self._trusted = self._marked if self._done.query() else self._marked - 1

    def check(self) -> None:
        """After reading, and waiting for, what the newest update has made: raises PeerLostError if it is not sound."""
        with self._lock:
            if self._trusted is not None and self._marked > self._trusted:
                raise PeerLostError("the collectives were broken before this update was done: it may be wrong")
