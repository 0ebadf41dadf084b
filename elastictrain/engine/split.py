"""A replica of several ranks, each with a part of the model: what pipelines and tensor parallelism have in common.

    a part    has its parameters under their names in the whole, or shares of them (`state.slab`): so its state is
              fragments of the same logical tensors as under any other layout
    the grid  DeepSpeed's groups: data-parallel ranks hold the same part, model-parallel ones a replica together
    losses    one rank of each replica tells them; all others hear of them in one small collective after the update

By itself this is tensor parallelism: all ranks of a replica run each micro-batch together, each with its share of every
matrix (`workloads.sharing`). What is not split, the norms, is the same on all of them, and the first exports it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elastictrain.config import TrainConfig
from elastictrain.engine.compiled import compile_blocks, is_compiled
from elastictrain.engine.group import RankGroup
from elastictrain.engine.sequence import losses_of_replicas, sequence_peers
from elastictrain.engine.zero import ZeroEngine
from elastictrain.engine.zero_state import Piece
from elastictrain.plan.part import part_of
from elastictrain.workloads.base import Batch, SplitWorkload
from elastictrain.workloads.experts import Exchange
from elastictrain.workloads.sharing import Peers


class SplitEngine(ZeroEngine):
    """One rank of a replica; see `base.Engine` for the contract."""

    _workload: SplitWorkload  # the config refuses to split others
    _must_ask = True

    def _build_module(self, config: TrainConfig, group: RankGroup) -> nn.Module:
        layout, workload = self._layout, self._workload
        self._part = part_of(workload.shape, layout, group.rank)
        peers = Peers(layout.tp, self._sum, self._gather) if layout.tp > 1 else None
        self._slabs = workload.slabs(self._part)
        sequence = sequence_peers(layout, group) if layout.sp > 1 else None
        self._tells = self._part.last and self._part.tp_index == self._part.sp_index == 0
        share, exchange = 1 / layout.accumulation, self._exchange(group)
        module = self._with_memory(
            workload.build_part(self._seed, self._part, peers, exchange, sequence, loss_share=share)
        )
        if is_compiled(config, layout):
            compile_blocks(workload.blocks(module))
        for name, parameter in module.named_parameters():
            # DeepSpeed's norm counts what is not split once
            parameter.tensor_model_parallel = name in self._slabs  # type: ignore[attr-defined]  # Megatron's
        self._mark_experts(module)
        return self._placed_on_grid(module, group)

    def _exchange(self, group: RankGroup) -> Exchange | None:
        """Collective: what takes tokens to the experts of other ranks, if any do."""
        return None

    def _mark_experts(self, module: nn.Module) -> None:
        """Show DeepSpeed which parameters are experts of this rank's own, if any are."""

    def _placed_on_grid(self, module: nn.Module, group: RankGroup) -> nn.Module:
        """Make the groups; returns what DeepSpeed is given to train."""
        from deepspeed.runtime.pipe.topology import PipelineParallelGrid

        with contextlib.redirect_stdout(io.StringIO()):  # it prints its plans
            self._grid = PipelineParallelGrid(topology=self._topology())
        group.know_connections()
        return module

    def _topology(self) -> Any:
        from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

        # ranks that share sequences are data-parallel ones to DeepSpeed: see `sequence`
        return PipeModelDataParallelTopology(self._layout.pp, self._layout.tp, self._layout.zero_group)

    def _initialize(self, config: Mapping[str, Any]) -> Any:
        import deepspeed

        engine, *_ = deepspeed.initialize(
            model=self._module, optimizer=self._adamw, config=config, mpu=self._grid, dist_init_required=False
        )
        return engine

    def _whole_shapes(self, parameters: Mapping[str, Tensor]) -> Mapping[str, tuple[int, ...]]:
        return self._workload.parameter_shapes

    def _is_exported(self, piece: Piece) -> bool:
        return self._part.tp_index == 0 or piece.parameter in self._slabs

    def _placed(self, batch: Batch) -> Batch:
        shared = self._layout.sp > 1
        return super()._placed(self._workload.positions_of(batch, self._part) if shared else batch)

    def _gathered(self, losses: Tensor) -> Tensor:
        gathered = losses.new_empty(self._layout.zero_group * len(losses))
        dist.all_gather_into_tensor(gathered, losses, group=self._grid.get_data_parallel_group())
        return losses_of_replicas(gathered, self._layout)

    def _everyones(self, losses: Tensor) -> Tensor:
        layout, place = self._layout, self._place
        known = torch.zeros(layout.dp, layout.sp, layout.accumulation, device=self._device.torch_device)
        if self._part.last and place.tp == 0:
            known[place.dp, place.sp] = losses
        dist.all_reduce(known)
        return losses_of_replicas(known, layout)

    def _clip_gradients(self, most: float) -> float:
        parameters = {name: p for name, p in self._module.named_parameters() if p.grad is not None}
        squares = self._squares(
            {n: p for n, p in parameters.items() if self._part.tp_index == 0 or p.tensor_model_parallel}  # type: ignore[attr-defined]  # set above
        )
        dist.all_reduce(squares, group=self._grid.get_model_parallel_group())
        norm = squares.sqrt()
        nn.utils.clip_grads_with_norm_(parameters.values(), most, norm)
        return float(norm)

    def _squares(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """The square of the norm of their gradients, on all ranks that share experts if any do."""
        return nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None]).square()

    def _sum(self, x: Tensor) -> Tensor:
        total = x.detach().to(torch.float32, copy=True).contiguous()
        dist.all_reduce(total, group=self._grid.get_slice_parallel_group())
        return total.to(x.dtype)

    def _gather(self, x: Tensor) -> Tensor:
        gathered = x.new_empty(self._layout.tp * x.numel())
        dist.all_gather_into_tensor(gathered, x.flatten(), group=self._grid.get_slice_parallel_group())
        return gathered.view(-1, *x.shape)
