"""A replica whose ranks share each sequence: what Ulysses needs of an engine (Jacobs et al. 2023, arXiv:2309.14509).

    a rank     holds the whole model, but for what ZeRO shards over all ranks, and runs its positions of each sequence
    attention  is the workload's: `workloads.sharing` trades positions for heads and back, through this engine's group
    gradients  each rank has those of the mean loss over its own positions, through whatever ranks they went; the mean
               over all ranks is that of all sequences, which is what DeepSpeed makes for data parallelism
    losses     of a micro-batch are the mean over its replica's ranks: one small collective a step

Under tensor parallelism and in a pipeline (`split`) the same holds of the ranks with the same share of the same stage.
Cost of a build in a warm process: a group for each replica, some milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elastictrain.config import TrainConfig
from elastictrain.engine.base import Phase
from elastictrain.engine.group import RankGroup
from elastictrain.engine.zero import ZeroEngine
from elastictrain.plan.layout import Layout, Place
from elastictrain.plan.part import part_of
from elastictrain.workloads.base import Batch, SplitWorkload
from elastictrain.workloads.sharing import SequencePeers


class SequenceEngine(ZeroEngine):
    """One rank of a replica that shares sequences; see `base.Engine` for the contract."""

    _workload: SplitWorkload  # the config refuses to split others

    def _build_module(self, config: TrainConfig, group: RankGroup) -> nn.Module:
        self._part = part_of(self._workload.shape, self._layout, group.rank)
        self._tells = self._part.sp_index == 0
        sequence = sequence_peers(self._layout, group)
        return self._with_memory(self._workload.build_part(self._seed, self._part, sequence=sequence))

    def _placed(self, batch: Batch) -> Batch:
        return super()._placed(self._workload.positions_of(batch, self._part))

    def _gradients(
        self, micro_batches: Sequence[tuple[int, Batch]], loss_limit: float | None, on_phase: Callable[[Phase], None]
    ) -> tuple[Tensor, Tensor | None]:
        own, known = super()._gradients(micro_batches, loss_limit, on_phase)
        known = self._everyones(own) if known is None else known
        return known.view(self._layout.dp, -1)[self._place.dp], known

    def _everyones(self, losses: Tensor) -> Tensor:
        return losses_of_replicas(super()._everyones(losses), self._layout)


def sequence_peers(layout: Layout, group: RankGroup) -> SequencePeers:
    """Collective: those that this rank shares sequences with; they have the same stage and share of matrices."""
    for pp, dp, tp in product(range(layout.pp), range(layout.dp), range(layout.tp)):
        ranks = [layout.rank(Place(pp, dp, tp, sp)) for sp in range(layout.sp)]
        made = dist.new_group(ranks)
        if group.rank in ranks:
            mine = made
    group.know_connections()

    def exchange(x: Tensor) -> Tensor:
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=mine)
        return received

    return SequencePeers(layout.sp, exchange)


def losses_of_replicas(losses: Tensor, layout: Layout) -> Tensor:
    """Of the ranks' own losses [dp x sp x accumulation], each over its own positions: [dp x accumulation]."""
    return losses.view(layout.dp, layout.sp, -1).mean(1).flatten()
