"""A whole state read from shards, wherever each lies: keepers' memory here or on other nodes, or files.

`plan_copies` says which ranges of which shard are needed; reads are grouped by shard and go straight into the
caller's buffers. Cost: the bytes asked for, once; nothing is assembled in between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from elastictrain.checkpoint.arena import Arena
from elastictrain.checkpoint.replicate import Address, ReplicaClient
from elastictrain.checkpoint.vault import StoredShard
from elastictrain.errors import CheckpointError
from elastictrain.state.reshard import plan_copies
from elastictrain.state.tensors import BYTES_PER_ELEMENT, Fragment, ShardIndex

Reads = list[tuple[int, memoryview]]
"""(first element in the shard, bytes to fill) pairs."""


class ShardedSource:
    """A StateSource over shards; `read(shard, reads)` fills the views from that shard."""

    def __init__(
        self,
        scalars: Mapping[str, int | float],
        shards: Mapping[int, ShardIndex],
        read: Callable[[int, Reads], None],
    ) -> None:
        self._scalars = scalars
        self._shards = shards
        self._read = read

    @property
    def scalars(self) -> Mapping[str, int | float]:
        """State that is no tensor."""
        return self._scalars

    def fill(self, targets: Sequence[tuple[Fragment, memoryview]]) -> None:
        """Write each fragment into its buffer; raises CheckpointError when no shard holds a part of one."""
        buffers = [_bytes_of(fragment, view) for fragment, view in targets]
        reads: dict[int, Reads] = defaultdict(list)
        for copy in plan_copies(self._shards, [fragment for fragment, _ in targets]):
            start = copy.target_offset * BYTES_PER_ELEMENT
            stop = start + copy.numel * BYTES_PER_ELEMENT
            reads[copy.shard].append((copy.source_offset, buffers[copy.target][start:stop]))
        for shard, of_shard in sorted(reads.items()):
            self._read(shard, sorted(of_shard, key=lambda pair: pair[0]))


@dataclass(frozen=True, slots=True)
class LocatedShard:
    """A remembered snapshot and the way to it."""

    stored: StoredShard
    address: Address | None
    """Its keeper's ReplicaServer; None for the reader's own node, where the memory is mapped."""


def memory_source(shards: Sequence[LocatedShard], token: bytes, *, timeout_s: float = 30) -> ShardedSource:
    """The state after one step, from keepers' memory; the shards must be verified ones of one generation and step."""
    moments = {(shard.stored.header.generation, shard.stored.header.step) for shard in shards}
    if len(moments) != 1:
        raise CheckpointError(f"shards of one snapshot are needed, not of (generation, step) {sorted(moments)}")

    def read(number: int, reads: Reads) -> None:
        shard = shards[number]
        if shard.address is None:
            _read_arena(shard.stored, reads)
        else:
            header = shard.stored.header
            with ReplicaClient(shard.address, token, timeout_s=timeout_s) as keeper:
                keeper.read(header.generation, header.rank, header.step, reads)

    indexes = {number: shard.stored.index for number, shard in enumerate(shards)}
    return ShardedSource(shards[0].stored.header.scalars, indexes, read)


def _read_arena(stored: StoredShard, reads: Reads) -> None:
    arena = Arena.open(stored.ticket)
    data = np.frombuffer(arena.buffer, np.uint8)
    for offset, view in reads:
        start = offset * BYTES_PER_ELEMENT
        np.frombuffer(view, np.uint8)[:] = data[start : start + len(view)]
    arena.close()


def _bytes_of(fragment: Fragment, view: memoryview) -> memoryview:
    if view.nbytes != fragment.numel * BYTES_PER_ELEMENT or view.readonly or not view.c_contiguous:
        raise ValueError(
            f"{fragment} needs a writable contiguous buffer of {fragment.numel * BYTES_PER_ELEMENT} bytes, "
            f"not {view.nbytes} bytes (read-only: {view.readonly})"
        )
    return view.cast("B") if view.nbytes else view
