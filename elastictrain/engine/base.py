"""The Protocol of an engine: one rank's share of training, and its state as named logical tensors.

All calls of an engine come from one training thread, with one exception: `export_into` may run in another thread
between two optimizer updates (from the end of `train_step` until the next one calls `before_update`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from elastictrain.engine.witness import Witness
from elastictrain.state.source import StateSource
from elastictrain.state.tensors import LogicalTensor, ShardIndex
from elastictrain.workloads.base import Batch

Phase = Literal["forward", "backward", "update"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step of one rank gives."""

    losses: tuple[float, ...]
    """Mean loss of each of this rank's micro-batches, in their order; none where another rank of its replica tells."""
    known_losses: tuple[float, ...]
    """The same of all ranks, by rank, if there was a limit or no update was made; else at least this rank's."""
    grad_norm: float
    """Global L2 norm of the averaged gradient before clipping; inf when the update was not made."""
    updated: bool
    """Whether the update was made; the same on all ranks. If not, weights, moments and step count are as before."""


class Engine(Protocol):
    """One rank of a distributed training engine."""

    def train_step(
        self,
        micro_batches: Sequence[tuple[int, Batch]],
        *,
        learning_rate: float,
        loss_limit: float | None = None,
        before_update: Callable[[], None],
        on_phase: Callable[[Phase], None],
    ) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one update.

        No update is made, on any rank, when a loss is not finite, the norm of the gradient is not, or the mean loss of
        all ranks is above `loss_limit`; None if no loss is too high.

        Each micro-batch comes with the seed of its dropout. `on_phase` is called before each forward, each backward
        and the update; `before_update` right before the update, when no export may be under way any more. Raises
        PeerLostError when a collective broke; what the workload raises comes through as it is.
        """
        ...

    def tensors(self) -> tuple[LogicalTensor, ...]:
        """Every logical tensor of the whole state, `<part>/<parameter>`, the same on all ranks."""
        ...

    def shard_index(self) -> ShardIndex:
        """What this rank exports: over all ranks every logical tensor exactly once, without padding."""
        ...

    def export_into(self, buffer: memoryview | torch.Tensor) -> None:
        """Copy this rank's shard into `buffer`: host memory, fp32, `shard_index().numel` elements.

        Raises PeerLostError where `fence` says that it may be wrong.
        """
        ...

    def fence(self) -> None:
        """Before this rank's collectives are broken, from any thread: an update that is not done by now is refused by
        `export_into` (PeerLostError), since on GPUs it may be made of what a broken collective left.
        """
        ...

    def scalars(self) -> Mapping[str, int | float]:
        """State that is no tensor: `optimizer_step`; with fp16 the loss scale."""
        ...

    def import_state(self, source: StateSource) -> None:
        """Take over a whole state, whatever layout wrote it; all ranks call this together."""
        ...

    @property
    def witness(self) -> Witness:
        """Finds memory of this rank that changed by itself; of no use any more once the engine is closed."""
        ...

    def close(self) -> None:
        """Give the engine's memory and hooks back; the process and its group can carry another engine afterwards."""
        ...
