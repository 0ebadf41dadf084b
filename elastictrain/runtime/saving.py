"""Which states of the keepers' memory are made durable, and what a checkpoint needs beside the shards.

Every `checkpoint.every` steps, before the memory of a state is let go, and at the end of the attempt. The bytes go from
the keepers to the storage (see `durable`); here is what the manifest says of them: layout, scalars, samples and loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from elastictrain.checkpoint.source import LocatedShard
from elastictrain.checkpoint.store import CheckpointStore
from elastictrain.config import TrainConfig
from elastictrain.control.restore import MemoryState
from elastictrain.data.order import cursor
from elastictrain.events import CheckpointRejected, Event, StepCommitted
from elastictrain.runtime.durable import Due, DurableWriter
from elastictrain.runtime.fleet import Fleet
from elastictrain.runtime.protocol import RestoreFrom
from elastictrain.runtime.story import Story
from elastictrain.state.tensors import LogicalTensor


class Saving:
    """Of one attempt. `poll` is called often."""

    def __init__(
        self, config: TrainConfig, fleet: Fleet, store: CheckpointStore, story: Story, emit: Callable[[Event], None]
    ) -> None:
        self._config, self._fleet, self._store, self._story, self._emit = config, fleet, store, story, emit
        self._writer: DurableWriter | None = None
        self.layouts: dict[int, dict[str, Any]] = {}
        """Of each generation that was ever formed, and so of every snapshot."""
        self.places: list[str] = []
        """The node of each rank of the newest generation: its keeper has the rank's state, whether the rank lives."""

    def know(self, tensors: tuple[LogicalTensor, ...]) -> None:
        """What the whole state consists of; nothing is written before this is known."""
        if self._writer is None and tensors:
            config = self._config
            self._writer = DurableWriter(config.run.name, self._store, tensors, config.checkpoint.keep_last, self._emit)

    @property
    def written_step(self) -> int:
        """Of the newest checkpoint that this attempt has written; -1 before the first."""
        return self._writer.written_step if self._writer is not None else -1

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writer is not None and self._writer.busy

    def poll(self) -> None:
        """Tell of what is written."""
        if self._writer is not None:
            self._writer.poll()

    def committed(self, event: StepCommitted) -> None:
        """Write this step if it is due."""
        if event.step % self._config.checkpoint.every == 0:
            self._write(event.step, event.generation, self.places)

    def restored(self) -> None:
        """Write the state that was restored last: who holds it in memory is about to go."""
        restored = self._story.restored
        if restored.source == "memory" and restored.step in self._story.commits.losses:
            generation = restored.shards[0].stored.header.generation
            self._write(restored.step, generation, [shard.stored.where for shard in restored.shards])

    def newest(self, best: tuple[MemoryState, Sequence[LocatedShard]], timeout_s: float) -> bool:
        """Write this state, the newest that there is; whether storage has it now."""
        if self._writer is None:
            return False
        state, shards = best
        deadline = time.monotonic() + timeout_s
        self._writer.finish(timeout_s)
        if self.written_step < state.step and state.step in self._story.commits.losses:
            self._write(state.step, state.generation, [shard.stored.where for shard in shards])
            self._writer.finish(deadline - time.monotonic())
        return self.written_step >= state.step

    def distrust(self, after: int) -> None:
        """What was written of later steps than this is of a corrupted state."""
        if self._writer is not None:
            self._writer.distrust(after)

    def from_storage(self) -> tuple[RestoreFrom, dict[str, Any] | None]:
        """The newest checkpoint, verified, and the layout that it was made under; or a fresh start."""

        def reject(step: int, uri: str, problem: str) -> None:
            self._emit(CheckpointRejected(time.time(), step, uri, problem))

        stored = self._store.take_newest({}, reject, lambda manifest: "")  # this attempt wrote or verified them
        if stored is None:
            return RestoreFrom("fresh", 0), None
        self._story.commits.chains[stored.step] = stored.manifest.sample_chain
        return RestoreFrom("durable", stored.step), dict(stored.manifest.layout)

    def _write(self, step: int, generation: int, nodes: Sequence[str]) -> None:
        """Write the snapshot of this step, rank i's shard being with the keeper of nodes[i]; if they are all there."""
        if self._writer is None or not self._fleet.nodes.keys() >= set(nodes):
            return
        commits = self._story.commits
        self._writer.request(
            Due(
                generation=generation,
                step=step,
                world_size=len(nodes),
                keepers={rank: self._fleet.nodes[node].keeper for rank, node in enumerate(nodes)},
                layout=self.layouts[generation],
                scalars=commits.scalars[step],
                samples=cursor(step, self._config.train.global_batch),
                sample_chain=commits.chains[step],
                loss=commits.losses[step],
            )
        )
