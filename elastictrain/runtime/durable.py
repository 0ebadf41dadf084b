"""Durable checkpoints, written from the keepers' memory while training goes on.

One at a time: shards by the keepers of the nodes that hold them, then the manifest, last and atomically, then the
pruning of old ones. A failure is told and the next checkpoint tries again; nothing half-written is ever listed.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from elastictrain.checkpoint.store import CheckpointStore, StoredCheckpoint
from elastictrain.errors import ElasticTrainError
from elastictrain.events import CheckpointFailed, CheckpointRejected, CheckpointRemoved, CheckpointWritten, Event
from elastictrain.runtime.causes import explain
from elastictrain.runtime.protocol import SaveReply
from elastictrain.state.manifest import Manifest, ShardEntry
from elastictrain.state.tensors import LogicalTensor

DISTRUST_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Due:
    """A committed step to be made durable."""

    generation: int
    step: int
    world_size: int
    keepers: Mapping[int, Any]
    """The keeper that holds each rank's shard."""
    layout: dict[str, Any]
    scalars: Mapping[str, int | float]
    samples: int
    sample_chain: str
    loss: float


class DurableWriter:
    """Writes checkpoints on its own thread; `emit` is called from `poll`, on the supervisor's."""

    def __init__(
        self,
        run: str,
        store: CheckpointStore,
        tensors: tuple[LogicalTensor, ...],
        keep_last: int,
        emit: Callable[[Event], None],
    ):
        self._run, self._store, self._tensors = run, store, tensors
        self._keep_last, self._emit = keep_last, emit
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="durable")
        self._running: Future[list[Event]] | None = None
        self._next: Due | None = None
        self.written_step = -1
        self.failed_step = -1
        self._written: list[int] = []

    def request(self, due: Due) -> None:
        """Make this step durable as soon as the one under way is; only the newest request waits."""
        self._next = due
        self.poll()

    def poll(self) -> None:
        """Tell what is done and start what waits."""
        if self._running is not None and self._running.done():
            events, self._running = self._running.result(), None
            for event in events:
                if isinstance(event, CheckpointWritten):
                    self.written_step = event.step
                    self._written.append(event.step)
                elif isinstance(event, CheckpointFailed):
                    self.failed_step = event.step
                self._emit(event)
        if self._running is None and self._next is not None:
            due, self._next = self._next, None
            self._running = self._thread.submit(self._write, due)

    @property
    def busy(self) -> bool:
        """Whether a write is under way or waits."""
        return self._running is not None or self._next is not None

    def finish(self, timeout_s: float) -> None:
        """Wait for what is under way."""
        end = time.monotonic() + timeout_s
        while self.busy and time.monotonic() < end:
            time.sleep(0.005)
            self.poll()

    def distrust(self, after: int) -> None:
        """What was written of later steps than this is of a corrupted state: set it aside, and what is under way too.

        Waits for the write under way, up to `DISTRUST_TIMEOUT_S`.
        """
        if self._next is not None and self._next.step > after:
            self._next = None
        self.finish(DISTRUST_TIMEOUT_S)
        for step in [step for step in self._written if step > after]:
            self._store.set_aside(step)
            problem = f"memory was found corrupted, and only what was written up to step {after} can be trusted"
            self._emit(CheckpointRejected(time.time(), step, self._store.uri(step), problem))
        self._written = [step for step in self._written if step <= after]
        self.written_step = max(self._written, default=-1)

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _write(self, due: Due) -> list[Event]:
        begun = time.time()
        try:
            entries = self._write_shards(due)
            stored = self._store.commit(
                Manifest(
                    run=self._run,
                    step=due.step,
                    samples=due.samples,
                    sample_chain=due.sample_chain,
                    loss=due.loss,
                    layout=due.layout,
                    scalars=dict(due.scalars),
                    tensors=self._tensors,
                    shards=tuple(entries),
                    created_at=begun,
                )
            )
            removed = self._store.prune(self._keep_last)
        except (ElasticTrainError, RayError, OSError) as error:
            self._store.abandon(due.step)
            problem = explain(error).message if isinstance(error, RayError) else str(error)
            return [CheckpointFailed(time.time(), due.step, problem.splitlines()[0])]
        now = time.time()
        removals = (CheckpointRemoved(now, step, self._store.uri(step)) for step in removed)
        return [as_written(stored, now, seconds=now - begun), *removals]

    def _write_shards(self, due: Due) -> list[ShardEntry]:
        by_keeper: dict[Any, list[int]] = defaultdict(list)
        for rank, keeper in due.keepers.items():
            by_keeper[keeper].append(rank)
        calls = [
            keeper.save.remote(due.generation, due.step, ranks, due.world_size) for keeper, ranks in by_keeper.items()
        ]
        replies, failures = list[SaveReply](), list[RayError]()
        for call in calls:  # to the last: none writes any more when a failure is told
            try:
                replies.append(ray.get(call))
            except RayError as error:
                failures.append(error)
        if failures:
            raise failures[0]
        entries = [entry for reply in replies for entry in reply.entries]
        return sorted(entries, key=lambda e: e.file)


def as_written(stored: StoredCheckpoint, now: float, *, seconds: float = 0.0, origin: str = "") -> CheckpointWritten:
    """The event that tells of it; it took `seconds`, or 0 when whoever wrote it did not live to tell."""
    manifest = stored.manifest
    return CheckpointWritten(
        at=now,
        step=stored.step,
        uri=stored.uri,
        num_bytes=stored.num_bytes,
        sha256=stored.sha256,
        seconds=seconds,
        samples=manifest.samples,
        sample_chain=manifest.sample_chain,
        loss=manifest.loss,
        layout=dict(manifest.layout),
        origin=origin,
    )
