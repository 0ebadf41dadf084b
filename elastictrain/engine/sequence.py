"""A replica whose ranks share each sequence: what Ulysses needs of an engine (Jacobs et al. 2023, arXiv:2309.14509).

    a rank     holds the whole model, but for what ZeRO shards over all ranks, and runs its positions of each sequence
    attention  is the workload's: `workloads.sharing` trades positions for heads and back, through this engine's group
    gradients  each rank has those of the mean loss over its own positions, through whatever ranks they went; the mean
               over all ranks is that of all sequences, which is what DeepSpeed makes for data parallelism
    losses     of a micro-batch are the mean over its replica's ranks: one small collective a step

Cost of a build in a warm process: a group for each replica, some milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elastictrain.config import TrainConfig
from elastictrain.engine.base import Phase
from elastictrain.engine.group import RankGroup
from elastictrain.engine.zero import ZeroEngine
from elastictrain.plan.part import part_of
from elastictrain.workloads.base import Batch, SplitWorkload
from elastictrain.workloads.sharing import SequencePeers


class SequenceEngine(ZeroEngine):
    """One rank of a replica that shares sequences; see `base.Engine` for the contract."""

    _workload: SplitWorkload  # the config refuses to split others

    def _build_module(self, config: TrainConfig, group: RankGroup) -> nn.Module:
        layout = self._layout
        self._part = part_of(self._workload.shape, layout, group.rank)
        self._tells = self._part.sp_index == 0
        for dp in range(layout.dp):
            ranks = [layout.rank(replace(self._place, dp=dp, sp=sp)) for sp in range(layout.sp)]
            peers = dist.new_group(ranks)
            if dp == self._place.dp:
                self._replica = peers
        group.know_connections()
        sequence = SequencePeers(layout.sp, self._exchange)
        return self._with_memory(self._workload.build_part(self._seed, self._part, sequence=sequence))

    def _exchange(self, x: Tensor) -> Tensor:
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=self._replica)
        return received

    def _placed(self, batch: Batch) -> Batch:
        return super()._placed(self._workload.positions_of(batch, self._part))

    def _gradients(
        self, micro_batches: Sequence[tuple[int, Batch]], loss_limit: float | None, on_phase: Callable[[Phase], None]
    ) -> tuple[Tensor, Tensor | None]:
        own, known = super()._gradients(micro_batches, loss_limit, on_phase)
        known = self._everyones(own) if known is None else known
        return known.view(self._layout.dp, -1)[self._place.dp], known

    def _everyones(self, losses: Tensor) -> Tensor:
        by_rank = super()._everyones(losses).view(self._layout.dp, self._layout.sp, -1)
        return by_rank.mean(1).flatten()
