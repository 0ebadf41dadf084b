"""What a keeper remembers: two buffers for each (generation, rank), its own node's shards and its buddies' alike.

One of a slot's buffers holds the newest committed snapshot and is never written to; the other takes the next one. A
write counts only once it is committed under the fence, and a received one only after its checksum was found right, so
a half copy is never served. When a generation is fenced, its committed snapshots can still be read, and nothing can
be added. Memory: two shards for each rank of this node and two for each that it keeps for a buddy; twice that between
a recovery and the `release` after the new generation's first snapshot. No I/O, no clock; safe from many threads.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from elastictrain.checkpoint.arena import Arena, ArenaTicket
from elastictrain.checkpoint.checksum import checksum
from elastictrain.errors import CheckpointError, StaleGenerationError
from elastictrain.state.tensors import ShardHeader, ShardIndex

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredShard:
    """A snapshot of one rank that a vault holds."""

    header: ShardHeader
    index: ShardIndex
    replica: bool
    """Kept for another node's worker."""
    where: str
    """The vault that holds it."""
    ticket: ArenaTicket
    """Its memory, for processes of that node."""


@dataclass(eq=False)
class _Slot:
    index: ShardIndex
    world_size: int
    replica: bool
    arenas: tuple[Arena, Arena]
    headers: list[ShardHeader | None] = field(default_factory=lambda: [None, None])
    filling: threading.Lock = field(default_factory=threading.Lock)
    """Held while a replica is received."""

    def committed(self) -> list[tuple[ShardHeader, int]]:
        """(header, buffer) of what is committed, newest first."""
        held = [(header, buffer) for buffer, header in enumerate(self.headers) if header is not None]
        return sorted(held, key=lambda pair: -pair[0].step)

    def close(self) -> None:
        for arena in self.arenas:
            arena.close()


def log_damage(header: ShardHeader) -> None:
    """Report a snapshot that no longer has its checksum."""
    _log.error(
        "the snapshot of step %d, rank %d, generation %d is damaged in memory (checksum %s no longer holds): not used",
        header.step,
        header.rank,
        header.generation,
        header.checksum,
    )


class Vault:
    """The snapshots of one keeper. `where` names it to others; `on_damage` hears of a snapshot found damaged."""

    def __init__(self, where: str, on_damage: Callable[[ShardHeader], None] = log_damage) -> None:
        self._where = where
        self._on_damage = on_damage
        self._lock = threading.Lock()
        self._slots: dict[tuple[int, int], _Slot] = {}
        self._fenced_below = 0

    def attach(self, generation: int, rank: int, world_size: int, index: ShardIndex) -> tuple[ArenaTicket, ArenaTicket]:
        """Make the two buffers that a worker of this node will fill in turn.

        Raises StaleGenerationError for a fenced generation, and CheckpointError when the rank has its buffers.
        """
        slot = self._add(generation, rank, world_size, index, replica=False)
        return slot.arenas[0].ticket, slot.arenas[1].ticket

    def commit(self, header: ShardHeader, buffer: int) -> None:
        """The worker has filled this buffer (0 or 1) with the snapshot that `header` describes.

        Committing the same again changes nothing. Refused: a fenced generation (StaleGenerationError); the buffer
        that holds the newest snapshot, which a writer must never touch, and a step that is not newer (CheckpointError).
        """
        with self._lock:
            self._refuse_stale(header.generation)
            slot = self._slots.get((header.generation, header.rank))
            if slot is None or slot.replica:
                raise CheckpointError(f"rank {header.rank} of generation {header.generation} has no buffers here")
            if slot.headers[buffer] == header:
                return
            _refuse_old(slot, header)
            newest = slot.committed()[:1]
            if newest and newest[0][1] == buffer:
                raise CheckpointError(
                    f"rank {header.rank} wrote step {header.step} over step {newest[0][0].step}, its only snapshot"
                )
            slot.headers[buffer] = header

    def receive(self, header: ShardHeader, index: ShardIndex, fill: Callable[[memoryview], None]) -> None:
        """Take another node's snapshot: `fill` writes it into the spare buffer, and it counts if its checksum is right.

        Does not call `fill` when this very snapshot is held already. Raises as `commit`, and CheckpointError for a
        wrong checksum; then, and when `fill` raises, the newest snapshot held before is untouched.
        """
        key = header.generation, header.rank
        with self._lock:
            self._refuse_stale(header.generation)
            slot = self._slots.get(key)
        if slot is None:
            slot = self._add(header.generation, header.rank, header.world_size, index, replica=True)
        if not slot.replica or slot.index != index:
            raise CheckpointError(f"rank {header.rank} of generation {header.generation} is kept here as another shard")
        with slot.filling:
            with self._lock:
                self._refuse_stale(header.generation)
                if header in slot.headers:
                    return
                _refuse_old(slot, header)
                spare = 1 - slot.committed()[0][1] if slot.committed() else 0
                slot.headers[spare] = None
            target = slot.arenas[spare].buffer
            fill(target)
            if checksum(target) != header.checksum:
                raise CheckpointError(
                    f"the snapshot of step {header.step}, rank {header.rank} arrived damaged: its checksum is not "
                    f"{header.checksum}"
                )
            with self._lock:
                self._refuse_stale(header.generation)
                slot.headers[spare] = header

    def fence(self, generation: int) -> None:
        """Refuse every write of generations below this one, from now on."""
        with self._lock:
            self._fenced_below = max(self._fenced_below, generation)

    def inventory(self, verify: bool = True) -> list[StoredShard]:
        """All committed snapshots; with `verify`, only those whose bytes still have their checksum.

        A rank's newest snapshot without its checksum is damaged, and reported. An older one without it is being
        overwritten by the worker's next copy, as it should be, and just left out. What is returned stays whole if the
        generation is fenced and its workers have ended or closed their SnapshotWriter.
        """
        with self._lock:
            candidates = [
                (slot, header, slot.arenas[buffer])
                for slot in self._slots.values()
                for header, buffer in slot.committed()
            ]
            views = [arena.buffer for _, _, arena in candidates]
        found = []
        for (slot, header, arena), view in zip(candidates, views, strict=True):
            if not verify or checksum(view) == header.checksum:
                found.append(StoredShard(header, slot.index, slot.replica, self._where, arena.ticket))
                continue
            with self._lock:
                damaged = slot.committed()[0][0] is header
            if damaged:
                self._on_damage(header)
        return found

    def index(self, generation: int, rank: int) -> ShardIndex:
        """What the shard of this rank holds."""
        with self._lock:
            slot = self._slots.get((generation, rank))
        if slot is None:
            raise CheckpointError(f"rank {rank} of generation {generation} has no buffers in {self._where}")
        return slot.index

    def view(self, generation: int, rank: int, step: int) -> memoryview:
        """The bytes of a committed snapshot, read-only, without a copy."""
        with self._lock:
            return self._find(generation, rank, step)[1]

    def pin(self, generation: int, rank: int, step: int) -> memoryview:
        """A verified copy of a committed snapshot, for a slow reader while training goes on.

        Raises CheckpointError when the bytes were overwritten or damaged before they were copied.
        """
        with self._lock:
            header, source = self._find(generation, rank, step)
        # numpy copies without holding the interpreter, so that heartbeats go on during a copy of gigabytes.
        copy = np.frombuffer(source, np.uint8).copy()
        if checksum(copy.data) != header.checksum:
            raise CheckpointError(
                f"the snapshot of step {step}, rank {rank} changed before it could be copied: it was overwritten by "
                f"a later step, or damaged"
            )
        return copy.data

    def release(self, before_generation: int) -> None:
        """Free all snapshots of generations below this one, and fence them."""
        with self._lock:
            self._fenced_below = max(self._fenced_below, before_generation)
            for key in [key for key in self._slots if key[0] < before_generation]:
                self._slots.pop(key).close()

    @property
    def newest_generation(self) -> int:
        """The highest that this vault has heard of: whoever takes over begins above it."""
        with self._lock:
            return max([self._fenced_below, *(generation for generation, _ in self._slots)])

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        with self._lock:
            return sum(arena.ticket.num_bytes for slot in self._slots.values() for arena in slot.arenas)

    def _add(self, generation: int, rank: int, world_size: int, index: ShardIndex, *, replica: bool) -> _Slot:
        # Made outside the lock: reserving gigabytes takes a while, and others need not wait for it.
        slot = _Slot(index, world_size, replica, _two_arenas(index.num_bytes))
        try:
            with self._lock:
                self._refuse_stale(generation)
                if (generation, rank) in self._slots:
                    raise CheckpointError(f"rank {rank} of generation {generation} already has its buffers here")
                self._slots[generation, rank] = slot
        except BaseException:
            slot.close()
            raise
        return slot

    def _refuse_stale(self, generation: int) -> None:
        if generation < self._fenced_below:
            raise StaleGenerationError(f"generation {generation} is fenced: {self._fenced_below} is the oldest allowed")

    def _find(self, generation: int, rank: int, step: int) -> tuple[ShardHeader, memoryview]:
        slot = self._slots.get((generation, rank))
        for header, buffer in slot.committed() if slot else ():
            if header.step == step and slot is not None:
                return header, slot.arenas[buffer].buffer.toreadonly()
        raise CheckpointError(f"no snapshot of step {step}, rank {rank}, generation {generation} in {self._where}")


def _two_arenas(num_bytes: int) -> tuple[Arena, Arena]:
    first = Arena.create(num_bytes)
    try:
        return first, Arena.create(num_bytes)
    except BaseException:
        first.close()
        raise


def _refuse_old(slot: _Slot, header: ShardHeader) -> None:
    newest = slot.committed()[:1]
    if header.world_size != slot.world_size:
        raise CheckpointError(f"a snapshot of {header.world_size} ranks in a generation of {slot.world_size}")
    if newest and header.step <= newest[0][0].step:
        raise CheckpointError(f"step {header.step} of rank {header.rank} is not newer than step {newest[0][0].step}")
