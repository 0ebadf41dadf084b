"""DeepSpeed's PipelineEngine as an Engine: one stage of the model on each rank, with data parallelism and ZeRO 0 or 1.

    schedule   1F1B (Narayanan et al. 2021): a stage holds the activations of at most pp micro-batches, and stands idle
               for (pp - 1) / (pp - 1 + accumulation) of the step
    a stage    a `plan.part.Part` of the model (`split`), which tensor parallelism may share out further
    tied       a weight that the first stage and the last use lies in the first; the last borrows it (`tied`)

DeepSpeed runs the schedule and sends the activations; what a micro-batch's pass begins with, where the step ends and
whether the update is made is decided here, as in `zero`. Only ranks of the last stage have losses.

Cost of a build in a warm process: the groups of the grid, 20 to 60 ms, beside the workload's own.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from elastictrain.engine.base import Phase
from elastictrain.engine.group import RankGroup
from elastictrain.engine.split import SplitEngine
from elastictrain.engine.tied import TiedWeights
from elastictrain.engine.zero import veto
from elastictrain.workloads.base import Batch
from elastictrain.workloads.seeding import seed_draws


class PipelineEngine(SplitEngine):
    """One rank of a pipeline; see `base.Engine` for the contract."""

    # ------------------------------------------------------------------------------------------------------- the stage

    def _placed_on_grid(self, module: nn.Module, group: RankGroup) -> nn.Module:
        from deepspeed.runtime.pipe.module import PipelineModule

        self._stage = module
        # DeepSpeed deals layers to stages one by one: each stage is one layer, and those of others are never called.
        layers = [module if number == self._place.pp else _elsewhere for number in range(self._layout.pp)]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its plans
            stages: Any = PipelineModule(
                layers, topology=self._topology(), loss_fn=self._output_loss, partition_method="uniform"
            )
        self._grid = stages.mpu()
        group.know_connections()
        self._tied = self._tie(dict(module.named_parameters()))
        return cast(nn.Module, stages)

    def _tie(self, parameters: Mapping[str, nn.Parameter]) -> TiedWeights | None:
        if not self._workload.tied or not (self._is_first or self._is_last):
            return None
        weights = [parameters[name] for name in self._workload.tied]
        other = replace(self._place, pp=self._layout.pp - 1 if self._is_first else 0)
        return TiedWeights(weights, self._layout.rank(other), owned=self._is_first)

    def _logical(self, name: str) -> str:
        return name.removeprefix(f"{self._place.pp}.")

    def _borrowed(self) -> frozenset[str]:
        return frozenset(self._workload.tied if self._is_last else ())

    @property
    def _is_first(self) -> bool:
        return self._place.pp == 0

    @property
    def _is_last(self) -> bool:
        return self._place.pp == self._layout.pp - 1

    def _initialize(self, config: Mapping[str, Any]) -> Any:
        from deepspeed.runtime.pipe import schedule

        # it finds the grid in the module
        engine = super(SplitEngine, self)._initialize(config)
        engine._INSTRUCTION_MAP = {
            **engine._INSTRUCTION_MAP,
            schedule.LoadMicroBatch: self._load,
            schedule.ForwardPass: self._forward,
            schedule.BackwardPass: self._backward,
            schedule.ReduceTiedGrads: self._reduce_tied,
            schedule.OptimizerStep: _later,
        }
        return engine

    def _refresh(self) -> None:
        super()._refresh()
        if self._tied is not None:
            self._tied.lend()

    def close(self) -> None:
        """See `base.Engine.close`."""
        if self._tied is not None:
            self._tied.release()
        super().close()

    # -------------------------------------------------------------------------------------------------------- one step

    def _gradients(
        self, micro_batches: Sequence[tuple[int, Batch]], loss_limit: float | None, on_phase: Callable[[Phase], None]
    ) -> tuple[Tensor, Tensor | None]:
        self._seeds = iter([seed for seed, _ in micro_batches])
        self._batches = iter([self._placed(batch) for _, batch in micro_batches])
        self._num_backward, self._loss_limit, self._on_phase = 0, loss_limit, on_phase
        engine = self._engine
        engine.total_loss, engine._compute_loss = None, True
        engine._exec_schedule(engine._train_schedule())
        return self._own_losses(), None

    def _own_losses(self) -> Tensor:
        losses = self._engine.fwd_outputs
        return torch.stack(losses).float() if losses else torch.empty(0, device=self._device.torch_device)

    def _output_loss(self, output: Tensor, batch: Batch) -> Tensor:
        return self._workload.output_loss(self._stage, output, batch)

    def _load(self, engine: Any, buffer_id: int) -> None:
        batch = next(self._batches)
        if self._is_first:
            engine.pipe_buffers["inputs"][buffer_id] = self._workload.part_input(batch)
        if self._is_last:
            engine.pipe_buffers["labels"][buffer_id] = batch

    def _forward(self, engine: Any, buffer_id: int) -> None:
        self._on_phase("forward")
        seed_draws(next(self._seeds))
        engine._exec_forward_pass(buffer_id)
        if self._is_last:
            # DeepSpeed would keep the scores of two micro-batches; the backward pass begins at the loss
            engine.pipe_buffers["outputs"][buffer_id] = None

    def _backward(self, engine: Any, buffer_id: int) -> None:
        self._num_backward += 1
        if self._is_last and self._num_backward == self._layout.accumulation:
            own = self._own_losses()
            known = own if self._loss_limit is None else self._gathered(own)
            engine.loss = engine.loss * veto(known, self._loss_limit, engine.loss.dtype)
        self._on_phase("backward")
        engine._exec_backward_pass(buffer_id)

    def _reduce_tied(self, engine: Any) -> None:
        if self._tied is not None:
            self._tied.give_gradients()

    def _take_step(self) -> None:
        self._engine._exec_optimizer_step()
        if self._tied is not None:
            self._tied.lend()


def _elsewhere(x: Tensor) -> Tensor:
    raise AssertionError("a layer of another stage was called")


def _later(engine: Any) -> None:
    """The update waits for `before_update`."""
