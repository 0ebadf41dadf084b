"""The memory of one rank at its worst moment, by part (pure).

A step has four moments that can be the worst; the estimate is that of the largest:

    loss       all activations, and three copies of the scores, or what a streamed loss has; gradients of earlier
               micro-batches
    backward   all layers' activations, the last one's backward pass at work; the bucket of gradients exists by now
    reduction  all gradients, and the copies that the collective needs; activations are gone
    update     gradients of this rank's share, flat and clipped; bf16's weights are gathered anew

What the process itself needs (code, the runtime's context) is `Device.reserved_bytes`; what an allocator loses
between tensors is `Device.fragmentation`, a share of what comes and goes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any

from elastictrain.plan.activations import BYTES, FP32, micro_batch_bytes
from elastictrain.plan.cluster import Device, Dtype
from elastictrain.plan.model_shape import ModelShape
from elastictrain.plan.space import Candidate
from elastictrain.plan.stage import Stage, heaviest, stage_of
from elastictrain.plan.zero_memory import StateBytes, state_bytes


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank at its worst moment; the parts add up to `device_bytes`."""

    moment: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    fragmentation: int
    reserved: int
    host_bytes: int
    """Offloaded to the host's memory, by this rank."""
    nvme_bytes: int
    """Offloaded to drives, by this rank."""

    @property
    def tensor_bytes(self) -> int:
        """What torch's allocator is asked for."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers

    @property
    def device_bytes(self) -> int:
        """All that must fit on the device."""
        return self.tensor_bytes + self.fragmentation + self.reserved

    def in_one_memory(self) -> Memory:
        """Where the device's memory is the host's: what is offloaded to that takes as much room as ever."""
        return replace(self, optimizer=self.optimizer + self.host_bytes, host_bytes=0)

    def to_json(self) -> dict[str, Any]:
        """Plain fields."""
        return asdict(self) | {"tensor_bytes": self.tensor_bytes, "device_bytes": self.device_bytes}


def memory_of(shape: ModelShape, dtype: Dtype, candidate: Candidate, device: Device) -> Memory:
    """Of the rank that needs most."""
    stages = (
        _memory_of_stage(shape, dtype, candidate, stage_of(shape, candidate, i), device) for i in heaviest(candidate)
    )
    return max(stages, key=lambda memory: memory.device_bytes)


def _memory_of_stage(shape: ModelShape, dtype: Dtype, candidate: Candidate, stage: Stage, device: Device) -> Memory:
    offload = candidate.offload != "none"
    state = _state(stage, dtype, candidate.zero_stage, candidate.zero_group, candidate.ep, candidate.pp > 1, offload)
    tokens = candidate.micro_batch * shape.seq_len // candidate.sp
    of_one = micro_batch_bytes(
        shape, dtype, tokens, num_layers=stage.num_layers,
        recompute=candidate.activation_checkpointing, tp=candidate.tp,
        streamed=shape.streams_loss,
    )  # fmt: skip
    in_flight = min(candidate.pp - stage.index, candidate.accumulation)
    kept = of_one.layers * in_flight
    several = candidate.accumulation > 1
    # A shared embedding's gradient is summed in fp32 by who borrows it, and received by who lends it.
    shared_sum = FP32 * stage.shared
    before = state.gradients_between if several else state.gradients_before
    bucket = state.bucket_between if several else state.bucket_before

    moments = {
        "backward": (before, state.bucket, kept + of_one.working),
        "reduction": (state.gradients_after, state.bucket + state.reduction, 0),
        "update": (state.update, 0, 0),
    }
    if stage.last:
        moments["loss"] = (before, bucket, kept + of_one.head + of_one.loss)
    optimizer, host, nvme, passing = state.optimizer, 0, 0, 0
    weights = state.weights + (0 if stage.first else BYTES[dtype] * stage.shared)
    if offload:
        # Masters and moments go; so do the gradients that they are updated with, and at stage 3 this rank's weights.
        masters = state.optimizer // 3
        if candidate.zero_stage == 3:
            host, weights = masters + weights, 0
        else:  # the updated weights pass through the host in their own dtype, and each gradient through both
            passing = BYTES[dtype] * stage.largest
            host = masters + BYTES[dtype] * masters // FP32 + passing
        optimizer = 0
        host, nvme = (host + state.optimizer, 0) if candidate.offload == "cpu" else (host, state.optimizer)
    passing_gathered = {"reduction": state.gathered_last, "update": 0}
    worst, most = "", -1
    for moment, (gradients, buffers, activations) in moments.items():
        comes_and_goes = activations + buffers + passing_gathered.get(moment, state.gathered)
        needs = gradients + comes_and_goes + int(device.fragmentation * comes_and_goes)
        if needs > most:
            worst, most = moment, needs
    gradients, buffers, activations = moments[worst]
    gathered = passing_gathered.get(worst, state.gathered)
    lost = int(device.fragmentation * (activations + buffers + gathered))
    parts = (weights + gathered, gradients + shared_sum, optimizer, activations, buffers + passing)
    return Memory(worst, *parts, lost, device.reserved_bytes, host, nvme)


@lru_cache(maxsize=4096)
def _state(
    stage: Stage, dtype: Dtype, zero_stage: int, zero_group: int, ep: int, pipeline: bool, offload: bool
) -> StateBytes:
    """Which does not depend on the micro-batch, and is most of what a search computes."""
    state = state_bytes(
        stage.dense,
        dtype,
        zero_stage,
        zero_group,
        table=stage.table,
        tied=stage.tied,
        small=stage.small,
        pipeline=pipeline,
        offload=offload,
    )
    if not stage.experts:
        return state
    sharing = max(1, zero_group // ep)
    experts = state_bytes(stage.experts, dtype, zero_stage, sharing, pipeline=pipeline, offload=offload)
    return StateBytes(*(getattr(state, f.name) + getattr(experts, f.name) for f in fields(StateBytes)))
