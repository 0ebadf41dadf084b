"""The worker's side of snapshots: copy the rank's shard into a keeper's memory while training goes on.

Protocol, per step s that is snapshotted: `begin(s, ...)` right after the optimizer update; forward and backward of the
next step run while a thread exports the shard into the buffer whose turn it is, checksums it, has the keeper commit
it, and waits for the buddy's copy; `wait()` right before the next optimizer update, which changes what is exported.

Why one step is always whole: a rank's `wait()` for s returns only when s is held by its keeper and its buddy. Only
then does it take part in the next update, and `begin` of the next snapshot overwrites s-1. So if every rank passes a
collective between its `wait()` and its next `begin` (for ZeRO 1 to 3 the update's own all-gather is one; without such
a collective, as in ZeRO 0, call a barrier, or `wait()` before the last gradient reduction), no rank overwrites s-1
before all ranks hold s. At every moment, and after any deaths, all shards have s-1 or all have s.

Costs one export and a checksum of the shard per snapshot, off the training thread: what is left is `wait()`'s return.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from elastictrain.checkpoint.arena import Arena, ArenaTicket
from elastictrain.checkpoint.checksum import checksum
from elastictrain.state.tensors import ShardHeader

Held = Callable[[], None]
"""Blocks until the keeper and the buddy hold the snapshot; raises when they can't."""


@dataclass(frozen=True, slots=True)
class _Job:
    step: int
    export: Callable[[memoryview], None]
    scalars: Mapping[str, int | float]
    note: str


class SnapshotWriter:
    """Writes the snapshots of one rank in one generation."""

    def __init__(
        self,
        tickets: tuple[ArenaTicket, ArenaTicket],
        generation: int,
        rank: int,
        world_size: int,
        committed: Callable[[ShardHeader, int], Held],
    ) -> None:
        """`committed(header, buffer)` tells the keeper, from the writer's thread, that a buffer is filled."""
        self._arenas = Arena.open(tickets[0]), Arena.open(tickets[1])
        self._identity = generation, rank, world_size
        self._committed = committed
        self._buffer = 0
        self._closed = False
        self.last: ShardHeader | None = None
        """Of the newest snapshot that was copied; sure after `wait()`."""
        self._failure: BaseException | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._copied = _set_event()
        self._held = _set_event()
        self._thread = threading.Thread(target=self._run, name="snapshot", daemon=True)
        self._thread.start()

    def begin(
        self, step: int, export: Callable[[memoryview], None], scalars: Mapping[str, int | float], note: str = ""
    ) -> None:
        """Start the snapshot of the state after `step`; first waits for the one before, if that was not done.

        `export` fills the whole buffer, in the thread; the state it reads must not change before `wait()` returns.
        `scalars` and `note` travel with it in its header.
        """
        self.wait()
        if self._closed:
            raise ValueError("the snapshot writer is closed")
        self._copied.clear()
        self._held.clear()
        self._jobs.put(_Job(step, export, dict(scalars), note))

    def wait(self) -> float:
        """Block until the last snapshot is copied and fully held; returns the seconds that took.

        Raises what went wrong with it, and goes on raising it: a writer that failed has no next snapshot.
        """
        begun = time.perf_counter()
        self._held.wait()
        if self._failure is not None:
            raise self._failure
        return time.perf_counter() - begun

    def close(self) -> None:
        """Let go of the memory. A copy in progress is finished and offered to the keeper; replicas aren't waited for.

        So a survivor of a failure gives its last snapshot a chance to count, and is not held up by a dead buddy.
        `wait()` still tells how it went.
        """
        self._closed = True
        self._copied.wait()
        self._jobs.put(None)
        for arena in self._arenas:
            arena.close()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                held = self._copy(job)
                self._copied.set()
                held()
            except BaseException as error:  # noqa: BLE001 - raised again in wait()
                self._failure = error
            finally:
                self._copied.set()
                self._held.set()

    def _copy(self, job: _Job) -> Held:
        target = self._arenas[self._buffer].buffer
        job.export(target)
        generation, rank, world_size = self._identity
        header = ShardHeader(generation, job.step, rank, world_size, checksum(target), job.scalars, job.note)
        held = self._committed(header, self._buffer)
        self.last = header
        self._buffer = 1 - self._buffer
        return held


def _set_event() -> threading.Event:
    event = threading.Event()
    event.set()
    return event
