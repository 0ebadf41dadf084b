"""DeepSpeed's ZeRO as an Engine: stages 0 to 3, fp32, bf16 and fp16, one optimizer step at a time.

Deterministic: the same layout, state and micro-batches give the same bits. Dropout is seeded per micro-batch, the
weights come from the workload's seed or an import, the rate is an argument. What DeepSpeed would keep between steps
(counters, schedules) decides nothing here, so the state is exactly the masters, the moments and one integer; with fp16
also the loss scale (`loss_scale`).
State that a model keeps outside its trainable parameters (buffers such as running means) is not part of it.
Each rank builds the whole model in host memory before ZeRO 3 shards it.

With a limit for the loss, a step has one small collective of its own, which shows every rank all losses before the
update: about 0.4 ms over gloo, and all ranks wait there for the slowest. Without one only a step without an update has.

Cost of a build in a warm process, beside the workload's own: 10 to 30 ms for stages 0 to 2, 0.2 to 0.5 s for stage 3
(it generates classes for every module).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elastictrain.config import TrainConfig
from elastictrain.engine.base import Phase, StepResult
from elastictrain.engine.compiled import compile_blocks, is_compiled
from elastictrain.engine.device import Device
from elastictrain.engine.drive import move_to_drive
from elastictrain.engine.failures import peer_loss_named
from elastictrain.engine.group import RankGroup
from elastictrain.engine.lean_build import lean_build
from elastictrain.engine.loss_scale import LossScale
from elastictrain.engine.quantized import send_as_int8
from elastictrain.engine.release import release
from elastictrain.engine.transfer import ShardExporter, Slabs, import_pieces, runs_of
from elastictrain.engine.witness import Replicas, Witness
from elastictrain.engine.zero_config import adamw, clips_itself, deepspeed_config
from elastictrain.engine.zero_state import Piece, find_pieces, share, start_moments
from elastictrain.plan.layout import Layout
from elastictrain.state.source import StateSource
from elastictrain.state.tensors import PARTS, LogicalTensor, ShardIndex
from elastictrain.workloads.base import Batch, RepeatingWorkload, Workload
from elastictrain.workloads.outlined import with_memory
from elastictrain.workloads.seeding import seed_draws

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ZeroEngine:
    """One rank of a ZeRO engine; see `base.Engine` for the contract. `split` says what parts of a model do else."""

    def __init__(
        self,
        workload: Workload,
        config: TrainConfig,
        layout: Layout,
        group: RankGroup,
        device: Device,
        *,
        loads_next: bool,
    ) -> None:
        """Use `build_engine`."""
        self._workload = workload
        self._seed = None if loads_next else config.train.seed
        self._layout = layout
        self._place = layout.place(group.rank)
        self._device = device
        self._input_dtype = DTYPES[config.train.dtype]
        self._clip = (config.train.grad_clip or math.inf) if clips_itself(config.train, layout) else None

        self._module = self._build_module(config, group)
        parameters = {self._logical(name): p for name, p in self._module.named_parameters() if p.requires_grad}
        borrowed = {name: parameters.pop(name) for name in self._borrowed()}
        shapes = self._whole_shapes(parameters)
        self._tensors = tuple(
            LogicalTensor(f"{part}/{name}", shape) for part in PARTS for name, shape in shapes.items()
        )
        self._adamw = adamw(workload, config.train, parameters)
        num_elements = sum(p.numel() for p in parameters.values())
        with lean_build(loads_next):
            self._engine: Any = self._initialize(deepspeed_config(config.train, layout, device, num_elements))
        if layout.gradient_dtype == "int8":
            send_as_int8(self._engine.optimizer)
        self._found = find_pieces(self._engine.optimizer, parameters)
        self._loss_scale = LossScale(self._engine.optimizer.loss_scaler) if config.train.dtype == "fp16" else None
        self._optimizer_step = 0
        start_moments(self._adamw, self._found.pieces, self._optimizer_step)
        if layout.offload == "nvme":
            move_to_drive(self._adamw, self._found.pieces, Path(str(config.parallel.offload_path)))

        exported = self._found.pieces
        if self._found.replicated:
            exported = self._share(exported)
        self._exporter = ShardExporter([p for p in exported if self._is_exported(p)], self._adamw.state, self._slabs)
        besides = runs_of([p for p in exported if not self._is_exported(p)], self._adamw.state)
        besides |= {f"the borrowed {name}": weight.detach() for name, weight in borrowed.items()}
        self._witness = self._new_witness(group, exported, besides)

    # -------------------------------------------------------------------------- what a part of the model does otherwise

    _slabs: Slabs = MappingProxyType({})
    """Where parameters lie in those of the whole model that are shares of them."""
    _tells = True
    """Whether this rank's losses are those of its replica."""
    _must_ask = False
    """Whether some rank does not know the losses of its replica."""

    def _build_module(self, config: TrainConfig, group: RankGroup) -> nn.Module:
        """What DeepSpeed is given to train."""
        workload = self._workload
        module = self._with_memory(workload.outline() if self._seed is None else workload.build(self._seed))
        if is_compiled(config, self._layout):
            compile_blocks(cast(RepeatingWorkload, workload).blocks(module))
        return module

    def _with_memory(self, module: nn.Module) -> nn.Module:
        """The module; weights that are only outlined get memory, which holds anything."""
        # ZeRO 3 takes weight after weight to the device, since it would not have room for all of them
        place = torch.device("cpu") if self._layout.zero_stage == 3 else self._device.torch_device
        return with_memory(module, self._input_dtype, place)

    def _logical(self, name: str) -> str:
        """The name in the whole model of a parameter of the module."""
        return name

    def _whole_shapes(self, parameters: Mapping[str, Tensor]) -> Mapping[str, tuple[int, ...]]:
        """Of every trainable parameter of the whole model."""
        return {name: tuple(p.shape) for name, p in parameters.items()}

    def _borrowed(self) -> frozenset[str]:
        """Parameters that are another rank's to update and export."""
        return frozenset()

    def _is_exported(self, piece: Piece) -> bool:
        """Whether no other rank exports this."""
        return True

    def _share(self, pieces: Iterable[Piece]) -> tuple[Piece, ...]:
        """What this rank exports of pieces that others hold too."""
        place, layout = self._place, self._layout
        return share(pieces, place.dp * layout.sp + place.sp, layout.zero_group)

    def _replicas(self) -> tuple[Sequence[Replicas], int]:
        """The weights that other ranks hold too, and how many sets of such ranks there are."""
        layout, place = self._layout, self._place
        alike = [replace(place, dp=dp, sp=sp) for dp in range(layout.dp) for sp in range(layout.sp)]
        number = place.pp * layout.tp + place.tp
        same = frozenset(map(layout.rank, alike))
        whole = [Replicas(number, same, self._found.whole)] if layout.zero_group > 1 else []
        return whole, layout.pp * layout.tp

    def _initialize(self, config: Mapping[str, Any]) -> Any:
        """DeepSpeed's engine of the module."""
        import deepspeed

        engine, *_ = deepspeed.initialize(
            model=self._module, optimizer=self._adamw, config=config, dist_init_required=False
        )
        return engine

    def _gradients(
        self, micro_batches: Sequence[tuple[int, Batch]], loss_limit: float | None, on_phase: Callable[[Phase], None]
    ) -> tuple[Tensor, Tensor | None]:
        """Forward and backward over the micro-batches; this rank's losses, and those of all ranks if they were asked.

        The last loss is multiplied by `veto` of all losses.
        """
        losses = []
        for position, (seed, batch) in enumerate(micro_batches, start=1):
            self._engine.set_gradient_accumulation_boundary(position == len(micro_batches))
            on_phase("forward")
            seed_draws(seed)
            loss = self._loss(self._placed(batch))
            losses.append(loss.detach().float())
            if position == len(micro_batches):
                own = torch.stack(losses)
                known = None if loss_limit is None else self._gathered(own)
                loss = loss * veto(own if known is None else known, loss_limit, loss.dtype)
            # after the losses' collective: a rank that leaves one out shows by being in the next phase
            on_phase("backward")
            self._engine.backward(loss)
        return own, known

    def _loss(self, batch: Batch) -> Tensor:
        # The engine is a module that forwards to the user's.
        return self._workload.loss(self._engine, batch)

    def _gathered(self, losses: Tensor) -> Tensor:
        """Collective of the ranks that have losses, before the last backward pass: those of all replicas."""
        return self._everyones(losses)

    def _everyones(self, losses: Tensor) -> Tensor:
        """Collective of all ranks: the losses of all replicas."""
        gathered = losses.new_empty(self._layout.world_size * len(losses))
        dist.all_gather_into_tensor(gathered, losses)
        return gathered

    def _clip_gradients(self, most: float) -> float:
        """Clip where DeepSpeed does not; returns the norm before."""
        return float(nn.utils.clip_grad_norm_(self._module.parameters(), most))

    def _take_step(self) -> None:
        self._engine.step()

    def _refresh(self) -> None:
        """Collective: the weights that forward uses follow from the masters again."""
        self._found.refresh()

    # ------------------------------------------------------------------------------------------------- the contract

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
        with peer_loss_named():
            own, known = self._gradients(micro_batches, loss_limit, on_phase)
            before_update()
            on_phase("update")
            for group in self._adamw.param_groups:
                group["lr"] = learning_rate
            scale = self._loss_scale.scalars() if self._loss_scale else {}
            grad_norm = self._update()
            self._exporter.mark_updated()
            updated = math.isfinite(grad_norm)
            self._optimizer_step += updated
            if known is None:
                known = self._everyones(own) if self._must_ask or not updated else own
            if self._loss_scale and not updated and not _is_sound(known, loss_limit):
                self._loss_scale.restore(scale)
            told = known.view(self._layout.dp, -1)[self._place.dp] if self._must_ask else own
            return StepResult(tuple(told.tolist()) if self._tells else (), tuple(known.tolist()), grad_norm, updated)

    def tensors(self) -> tuple[LogicalTensor, ...]:
        """See `base.Engine.tensors`."""
        return self._tensors

    def shard_index(self) -> ShardIndex:
        """See `base.Engine.shard_index`."""
        return self._exporter.index

    def export_into(self, buffer: memoryview | Tensor) -> None:
        """See `base.Engine.export_into`."""
        self._exporter.copy_into(buffer)

    def fence(self) -> None:
        """See `base.Engine.fence`."""
        self._exporter.fence()

    def scalars(self) -> Mapping[str, int | float]:
        """See `base.Engine.scalars`."""
        return {"optimizer_step": self._optimizer_step} | (self._loss_scale.scalars() if self._loss_scale else {})

    def import_state(self, source: StateSource) -> None:
        """See `base.Engine.import_state`."""
        self._optimizer_step = int(source.scalars["optimizer_step"])
        if self._loss_scale:
            self._loss_scale.restore(source.scalars)
        import_pieces(self._found.pieces, self._adamw.state, source, self._slabs)
        start_moments(self._adamw, self._found.pieces, self._optimizer_step)
        with peer_loss_named(), torch.no_grad():
            self._refresh()
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

    def _update(self) -> float:
        """Make the update unless the norm of the gradient is not finite; returns the norm, inf when it is not made."""
        if self._clip is not None:
            norm = self._clip_gradients(self._clip)
            if not math.isfinite(norm):
                self._engine.zero_grad()
                return math.inf
            self._take_step()
        else:
            self._take_step()
            norm = float(self._engine.get_global_grad_norm())
            if not self._engine.was_step_applied():
                if self._layout.offload != "none" and self._layout.zero_stage < 3:
                    # DeepSpeed would add the next step's gradients to those that it has just refused
                    refused = self._engine.optimizer.averaged_gradients
                    refused.update(dict.fromkeys(refused))
                return math.inf
        return norm

    def _new_witness(self, group: RankGroup, pieces: Sequence[Piece], besides: Mapping[str, Tensor]) -> Witness:
        replicas, num_sets = self._replicas()
        return Witness(
            rank=group.rank,
            device=self._device.torch_device,
            pieces=pieces,
            shard=self._exporter.runs,
            unexported=besides,
            replicas=replicas,
            num_sets=num_sets,
            own_weights=self._found.own_weights,
        )


def veto(losses: Tensor, limit: float | None, dtype: torch.dtype) -> Tensor:
    """1, or NaN when no update may be made: as a factor of one rank's loss it spoils the gradient of all ranks, and all
    stages of ZeRO refuse and clear a gradient that is not finite. Computed on the device, which nobody waits for.
    """
    return torch.where(_is_sound(losses, limit), 1.0, math.nan).to(dtype)


def _is_sound(losses: Tensor, limit: float | None) -> Tensor:
    mean = losses.double().mean()
    return mean.isfinite() & (mean <= (math.inf if limit is None else limit))
