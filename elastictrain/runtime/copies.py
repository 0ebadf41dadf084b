"""Copies of snapshots that are due to be made durable: a write takes its time, and training overwrites its snapshots.

A copy is made when its step is committed, and taken away by the write that it is for. Kept for each rank: the one whose
turn comes next and a newer one, which may become due before the writer is free; so at most two shards a rank, and none
while nothing is due. Safe from many threads.
"""

from __future__ import annotations

import threading

from elastictrain.checkpoint.vault import Vault
from elastictrain.state.tensors import ShardHeader

COPIES = 2
"""For each rank."""


class Copies:
    """Of the snapshots in `vault`."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._lock = threading.Lock()
        self._held: dict[tuple[int, int, int], memoryview] = {}

    def add(self, header: ShardHeader) -> None:
        """Copy this snapshot; raises CheckpointError when it changed meanwhile or is damaged."""
        data = self._vault.pin(header.generation, header.rank, header.step)
        with self._lock:
            self._held[header.generation, header.step, header.rank] = data
            for key in sorted(key for key in self._held if key[2] == header.rank)[:-COPIES]:
                del self._held[key]

    def take(self, generation: int, step: int, rank: int) -> memoryview:
        """The bytes of a snapshot; copied only now if it was not due.

        Raises CheckpointError when the vault has this snapshot no longer.
        """
        with self._lock:
            held = self._held.pop((generation, step, rank), None)
        return held if held is not None else self._vault.pin(generation, rank, step)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._held.clear()
