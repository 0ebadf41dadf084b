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
from elastictrain.engine.zero import ZeroEngine
from elastictrain.engine.zero_state import Piece
from elastictrain.plan.part import part_of
from elastictrain.workloads.base import SplitWorkload
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
        self._tells = self._part.last and self._part.tp_index == 0
        module = self._with_memory(workload.build_part(self._seed, self._part, peers))
        if is_compiled(config, layout):
            compile_blocks(workload.blocks(module))
        for name, parameter in module.named_parameters():
            # DeepSpeed's norm counts what is not split once
            parameter.tensor_model_parallel = name in self._slabs  # type: ignore[attr-defined]  # Megatron's
        return self._placed_on_grid(module, group)

    def _placed_on_grid(self, module: nn.Module, group: RankGroup) -> nn.Module:
        """Make the groups; returns what DeepSpeed is given to train."""
        from deepspeed.runtime.pipe.topology import PipelineParallelGrid

        with contextlib.redirect_stdout(io.StringIO()):  # it prints its plans
            self._grid = PipelineParallelGrid(topology=self._topology())
        group.know_connections()
        return module

    def _topology(self) -> Any:
        from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

        return PipeModelDataParallelTopology(self._layout.pp, self._layout.tp, self._layout.dp)

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

    def _gathered(self, losses: Tensor) -> Tensor:
        gathered = losses.new_empty(self._layout.dp * len(losses))
        dist.all_gather_into_tensor(gathered, losses, group=self._grid.get_data_parallel_group())
        return gathered

    def _everyones(self, losses: Tensor) -> Tensor:
        known = torch.zeros(self._layout.dp, self._layout.accumulation, device=self._device.torch_device)
        if self._tells:
            known[self._place.dp] = losses
        dist.all_reduce(known)
        return known.view(-1)

    def _clip_gradients(self, most: float) -> float:
        parameters = [p for p in self._module.parameters() if p.grad is not None]
        counted = [p for p in parameters if self._part.tp_index == 0 or p.tensor_model_parallel]  # type: ignore[attr-defined]  # set above
        squares = nn.utils.get_total_norm([p.grad for p in counted if p.grad is not None]).square()
        dist.all_reduce(squares, group=self._grid.get_model_parallel_group())
        norm = squares.sqrt()
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
        return float(norm)

    def _sum(self, x: Tensor) -> Tensor:
        total = x.detach().to(torch.float32, copy=True).contiguous()
        dist.all_reduce(total, group=self._grid.get_slice_parallel_group())
        return total.to(x.dtype)

    def _gather(self, x: Tensor) -> Tensor:
        gathered = x.new_empty(self._layout.tp * x.numel())
        dist.all_gather_into_tensor(gathered, x.flatten(), group=self._grid.get_slice_parallel_group())
        return gathered.view(-1, *x.shape)
