"""DeepSpeed's ZeRO as an Engine: stages 0 to 3, fp32 and bf16, one optimizer step at a time.

Deterministic: the same layout, state and micro-batches give the same bits. Dropout is seeded per micro-batch, the
weights come from the workload's seed or an import, the rate is an argument. What DeepSpeed would keep between steps
(counters, schedules, scalers) decides nothing here, so the state is exactly the masters, the moments and one integer.
State that a model keeps outside its trainable parameters (buffers such as running means) is not part of it.
Each rank builds the whole model in host memory before ZeRO 3 shards it.

With a limit for the loss, a step has one small collective of its own, which shows every rank all losses before the
update: about 0.4 ms over gloo, and all ranks wait there for the slowest. Without one only a step without an update has.

Cost of a build in a warm process, beside the workload's own: 10 to 30 ms for stages 0 to 2, 0.2 to 0.5 s for stage 3
(it generates classes for every module).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elastictrain.config import TrainConfig
from elastictrain.engine.base import Phase, StepResult
from elastictrain.engine.device import Device, prepare_process
from elastictrain.engine.failures import peer_loss_named
from elastictrain.engine.group import RankGroup
from elastictrain.engine.release import release
from elastictrain.engine.reset import forget_engine
from elastictrain.engine.transfer import ShardExporter, import_pieces
from elastictrain.engine.witness import Witness
from elastictrain.engine.zero_config import adamw, clips_itself, deepspeed_config
from elastictrain.engine.zero_state import find_pieces, share, start_moments
from elastictrain.plan.layout import Layout
from elastictrain.state.source import StateSource
from elastictrain.state.tensors import PARTS, LogicalTensor, ShardIndex
from elastictrain.workloads.base import Batch, Workload


def build_engine(workload: Workload, config: TrainConfig, layout: Layout, group: RankGroup) -> ZeroEngine:
    """The engine of this rank, initialised from `config.train.seed`; all ranks of the formed group call it together.

    Raises PeerLostError when one of them goes away meanwhile.
    """
    device = prepare_process()
    with peer_loss_named():
        try:
            return ZeroEngine(workload, config, layout, group, device)
        except BaseException:
            forget_engine()
            raise


class ZeroEngine:
    """One rank of a ZeRO engine; see `base.Engine` for the contract."""

    def __init__(
        self, workload: Workload, config: TrainConfig, layout: Layout, group: RankGroup, device: Device
    ) -> None:
        """Use `build_engine`."""
        import deepspeed

        self._workload = workload
        self._layout = layout
        self._device = device
        self._input_dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
        self._clip = (config.train.grad_clip or math.inf) if clips_itself(config.train, layout) else None

        module = workload.build(config.train.seed)
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._tensors = tuple(
            LogicalTensor(f"{part}/{name}", tuple(p.shape)) for part in PARTS for name, p in parameters.items()
        )
        self._adamw = adamw(workload, config.train, parameters)
        num_elements = sum(p.numel() for p in parameters.values())
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self._adamw,
            config=deepspeed_config(config.train, layout, device, num_elements),
            dist_init_required=False,
        )
        self._module: nn.Module = self._engine.module
        self._found = find_pieces(self._engine.optimizer, self._module)
        self._optimizer_step = 0
        start_moments(self._adamw, self._found.pieces, self._optimizer_step)
        exported = self._found.pieces
        if self._found.replicated:
            exported = share(exported, group.rank, group.world_size)
        self._exporter = ShardExporter(exported, self._adamw.state)
        self._witness = Witness(
            rank=group.rank,
            pieces=exported,
            shard=dict(zip(self._exporter.run_names, self._exporter.runs, strict=True)),
            replicated=self._found.whole if group.world_size > 1 else {},
            own_weights=self._found.own_weights,
        )

    def train_step(
        self,
        micro_batches: Sequence[tuple[int, Batch]],
        *,
        learning_rate: float,
        loss_limit: float | None = None,
        before_update: Callable[[], None],
        on_phase: Callable[[Phase], None],
    ) -> StepResult:
        """See `base.Engine.train_step`."""
        if len(micro_batches) != self._layout.accumulation:
            raise ValueError(f"{len(micro_batches)} micro-batches for {self._layout}")
        losses = []
        with peer_loss_named():
            for position, (seed, batch) in enumerate(micro_batches, start=1):
                self._engine.set_gradient_accumulation_boundary(position == len(micro_batches))
                on_phase("forward")
                torch.manual_seed(seed)
                # The engine is a module that forwards to the user's.
                loss = self._workload.loss(self._engine, self._placed(batch))
                losses.append(loss.detach().float())
                if position == len(micro_batches):
                    own = torch.stack(losses)
                    known = own if loss_limit is None else self._everyones(own)
                    loss = loss * _veto(known, math.inf if loss_limit is None else loss_limit, loss.dtype)
                # after the losses' collective: a rank that leaves one out shows by being in the next phase
                on_phase("backward")
                self._engine.backward(loss)
            before_update()
            on_phase("update")
            for group in self._adamw.param_groups:
                group["lr"] = learning_rate
            grad_norm = self._update()
            self._exporter.mark_updated()
            updated = math.isfinite(grad_norm)
            self._optimizer_step += updated
            if not updated and loss_limit is None:
                known = self._everyones(own)
            return StepResult(tuple(own.tolist()), tuple(known.tolist()), grad_norm, updated)

    def tensors(self) -> tuple[LogicalTensor, ...]:
        """See `base.Engine.tensors`."""
        return self._tensors

    def shard_index(self) -> ShardIndex:
        """See `base.Engine.shard_index`."""
        return self._exporter.index

    def export_into(self, buffer: memoryview | Tensor) -> None:
        """See `base.Engine.export_into`."""
        self._exporter.copy_into(buffer)

    def scalars(self) -> Mapping[str, int | float]:
        """See `base.Engine.scalars`."""
        return {"optimizer_step": self._optimizer_step}

    def import_state(self, source: StateSource) -> None:
        """See `base.Engine.import_state`."""
        self._optimizer_step = int(source.scalars["optimizer_step"])
        import_pieces(self._found.pieces, self._adamw.state, source)
        start_moments(self._adamw, self._found.pieces, self._optimizer_step)
        with peer_loss_named(), torch.no_grad():
            self._found.refresh()
        self._exporter.mark_updated()

    @property
    def witness(self) -> Witness:
        """See `base.Engine.witness`."""
        return self._witness

    def close(self) -> None:
        """See `base.Engine.close`."""
        release(self._engine, self._adamw)
        self.__dict__.clear()

    def _placed(self, batch: Batch) -> Batch:
        placed = {}
        for name, tensor in batch.items():
            dtype = self._input_dtype if tensor.is_floating_point() else tensor.dtype
            placed[name] = tensor.to(self._device.torch_device, dtype, non_blocking=True)
        return placed

    def _everyones(self, losses: Tensor) -> Tensor:
        gathered = losses.new_empty(self._layout.world_size * len(losses))
        dist.all_gather_into_tensor(gathered, losses)
        return gathered

    def _update(self) -> float:
        """Make the update unless the norm of the gradient is not finite; returns the norm, inf when it is not made."""
        if self._clip is not None:
            norm = float(nn.utils.clip_grad_norm_(self._module.parameters(), self._clip))
            if not math.isfinite(norm):
                self._engine.zero_grad()
                return math.inf
            self._engine.step()
        else:
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
            if not self._engine.was_step_applied():
                return math.inf
        return norm


def _veto(losses: Tensor, limit: float, dtype: torch.dtype) -> Tensor:
    """1, or NaN when no update may be made: as a factor of one rank's loss it spoils the gradient of all ranks, and all
    stages of ZeRO refuse and clear a gradient that is not finite. Computed on the device, which nobody waits for.
    """
    mean = losses.double().mean()
    return torch.where(mean.isfinite() & (mean <= limit), 1.0, math.nan).to(dtype)
