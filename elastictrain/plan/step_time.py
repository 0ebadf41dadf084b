"""Seconds that one step takes, by part (pure).

    step     = (m + p - 1) x micro-batch + reduction + update + offload + fixed    (1F1B: p stages, m micro-batches)
    bubble   = (p - 1) x micro-batch: the share (p - 1) / m of Narayanan et al. 2021, section 2.2.1
    compute  = flops / (peak x efficiency) + bytes that elementwise work moves / memory bandwidth

and each collective by its ring formula (`collectives.py`) over the slowest link that its group spans. What is reduced
when is DeepSpeed's doing: ZeRO 0 and 1 all-reduce gradients once a step, ZeRO 2 after each micro-batch (so accumulation
costs traffic), ZeRO 3 scatters them after each micro-batch and gathers weights for each. Gradients travel as
`parallel.gradient_dtype` says.

What share of stated speeds is reached is `Cluster.efficiency`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from elastictrain.plan.activations import BYTES, FP32, layer_bytes, made_again_bytes
from elastictrain.plan.cluster import Cluster, Dtype, Link
from elastictrain.plan.collectives import all_gather_s, all_reduce_s, all_to_all_s, send_s
from elastictrain.plan.layout import GradientDtype
from elastictrain.plan.model_shape import ModelShape
from elastictrain.plan.space import Candidate
from elastictrain.plan.stage import Stage, stage_of
from elastictrain.plan.zero_memory import LIVE_PARAMETERS

PASSES = 4
"""Times that each byte kept for the backward pass is read or written by elementwise work, forward and backward."""
TIMES_AGAIN = 2
"""Times that selective recomputation makes what it makes: `workloads.selective`."""
SCORE_PASSES = 6
"""The same for the scores over the vocabulary, in fp32."""
GRADIENT_BYTES: dict[GradientDtype, float] = {"fp32": 4, "bf16": 2, "int8": 1 + 4 / 256}
"""That an element of a gradient travels as: int8 brings a scale in fp32 for every 256."""
UPDATE_BYTES = 40
"""Read and written per element by the norm, clipping and AdamW: gradient 3 times, master and moments twice each."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step, by part; they add up to `step_s`."""

    compute: float
    recompute: float
    bubble: float
    tensor_parallel: float
    sequence_parallel: float
    expert_parallel: float
    pipeline: float
    gradients: float
    """Reducing them over data-parallel ranks."""
    weights: float
    """Gathering them from data-parallel ranks."""
    update: float
    offload: float
    fixed: float

    @property
    def step_s(self) -> float:
        """All of it."""
        seconds: float = sum(getattr(self, part) for part in self.__slots__)
        return seconds

    def to_json(self) -> dict[str, Any]:
        """Plain fields."""
        return asdict(self) | {"step_s": self.step_s}


def step_time(
    shape: ModelShape,
    dtype: Dtype,
    candidate: Candidate,
    cluster: Cluster,
    chunks: int = 1,
) -> StepTime:
    """Of the slowest stage, which sets the pace of all.

    `chunks` is the number of pieces that an interleaved schedule deals to each stage; DeepSpeed has none.
    """
    indices = sorted({0, candidate.pp - 1})
    stages = [stage_of(shape, candidate, index) for index in indices]
    times = [_of_stage(shape, dtype, candidate, stage, cluster, chunks) for stage in stages]
    return max(times, key=lambda time: time.step_s)


def model_flops(shape: ModelShape, global_batch: int) -> float:
    """That one step must compute, without what is recomputed."""
    return shape.flops_per_token(causal=shape.skips_masked) * global_batch * shape.seq_len


def _of_stage(
    shape: ModelShape,
    dtype: Dtype,
    c: Candidate,
    stage: Stage,
    cluster: Cluster,
    chunks: int,
) -> StepTime:
    device, efficiency, m, e = cluster.device, cluster.efficiency, c.accumulation, BYTES[dtype]
    tokens = c.micro_batch * shape.seq_len // c.sp
    peak = device.flops[dtype] * efficiency.matmul
    memory = device.memory_bytes_per_s * efficiency.memory

    forward_s = tokens * shape.layer_flops_per_token(causal=shape.skips_masked, empty_room=True) / c.tp / peak
    elementwise_s = PASSES * layer_bytes(shape, dtype, tokens, c.tp) / memory
    layers_s = stage.num_layers * (3 * forward_s + elementwise_s)
    again_s = 0.0
    if c.activation_checkpointing != "none":
        again_s = stage.num_layers * (forward_s + elementwise_s / PASSES)
    if c.activation_checkpointing == "selective":  # a part of that, whatever the estimates of tiny models say
        cheap_s = stage.num_layers * TIMES_AGAIN * made_again_bytes(shape, dtype, tokens, c.tp) / memory
        again_s = min(cheap_s, again_s)
    head_s = 0.0
    if stage.last:
        scores = tokens * shape.vocab_size / c.tp
        head_s = 3 * tokens * shape.head_flops_per_token / c.tp / peak + SCORE_PASSES * FP32 * scores / memory

    network = _Network(c, cluster)
    hidden = tokens * shape.hidden_size * e
    passes = 3 if c.activation_checkpointing == "full" else 2
    tensor_s = passes * 2 * stage.num_layers * network.all_reduce(hidden, "tp")
    heads = tokens * (2 * shape.query_size + 2 * shape.kv_size) * e / c.tp
    sequence_s = passes * stage.num_layers * network.all_to_all(heads, "sp")
    expert_s = 0.0
    if shape.num_experts > 1:
        expert_s = passes * 2 * stage.num_layers * network.all_to_all(hidden * shape.expert_room / c.tp, "ep")
    pipeline_s = network.send(hidden / c.tp) * 2 if c.pp > 1 else 0.0

    fixed_s = efficiency.micro_batch_s + (c.zero_stage == 3) * stage.num_layers * efficiency.gathered_layer_s
    micro_s = layers_s + head_s + again_s + tensor_s + sequence_s + expert_s + pipeline_s + fixed_s
    gradients_s, weights_s = _data_parallel(dtype, c, stage, network)
    hidden_share = 1 - efficiency.overlap
    share = stage.dense / (c.zero_group if c.zero_stage else 1)
    share += stage.experts / (max(1, c.zero_group // c.ep) if c.zero_stage else 1)
    offload_s, update_s = _update(dtype, c, share, cluster, memory)
    return StepTime(
        compute=m * (layers_s + head_s),
        recompute=m * again_s,
        bubble=(c.pp - 1) * micro_s / chunks,
        tensor_parallel=m * tensor_s,
        sequence_parallel=m * sequence_s,
        expert_parallel=m * expert_s,
        pipeline=m * pipeline_s,
        gradients=gradients_s * hidden_share,
        weights=weights_s * hidden_share,
        update=update_s,
        offload=offload_s,
        fixed=m * fixed_s + efficiency.step_s,
    )


class _Network:
    """Collectives over the groups of a candidate; ranks lie tp innermost, then sp, then dp, then pp."""

    def __init__(self, c: Candidate, cluster: Cluster) -> None:
        inner, share = c.tp * c.sp, cluster.efficiency.network
        self._ranks = {
            "tp": c.tp,
            "sp": c.sp,
            "ep": c.ep,
            "zero": c.zero_group,
            "experts": max(1, c.zero_group // c.ep),
        }
        spans = {"tp": c.tp, "sp": inner, "ep": min(c.ep * c.tp, inner * c.dp), "zero": inner * c.dp}
        spans["experts"] = spans["zero"]
        self._links = {group: _reached(cluster.link(span), share) for group, span in spans.items()}
        self._between_stages = _reached(cluster.link(inner * c.dp * c.pp), share)

    def all_reduce(self, num_bytes: float, group: str) -> float:
        return all_reduce_s(num_bytes, self._ranks[group], self._links[group])

    def all_gather(self, num_bytes: float, group: str) -> float:
        return all_gather_s(num_bytes, self._ranks[group], self._links[group])

    def all_to_all(self, num_bytes: float, group: str) -> float:
        return all_to_all_s(num_bytes, self._ranks[group], self._links[group])

    def send(self, num_bytes: float) -> float:
        return send_s(num_bytes, self._between_stages)


@lru_cache(maxsize=64)
def _reached(link: Link, share: float) -> Link:
    """What is reached of a link's stated speed."""
    return link.model_copy(update={"bytes_per_s": link.bytes_per_s * share})


def _data_parallel(dtype: Dtype, c: Candidate, stage: Stage, network: _Network) -> tuple[float, float]:
    """Seconds a step of reducing gradients, and of gathering weights."""
    e, gradients_s, weights_s = BYTES[dtype], 0.0, 0.0
    for elements, group in ((stage.dense, "zero"), (stage.experts, "experts")):
        if c.zero_stage == 3:
            times = 1 if elements <= LIVE_PARAMETERS else 2
            # a reduce-scatter takes as long, and so does the exchange of int8
            gradients_s += c.accumulation * network.all_gather(GRADIENT_BYTES[c.gradient_dtype] * elements, group)
            weights_s += c.accumulation * times * network.all_gather(e * elements, group)
            continue
        reductions = c.accumulation if c.zero_stage == 2 else 1
        gradients_s += reductions * network.all_reduce(GRADIENT_BYTES[c.gradient_dtype] * elements, group)
        weights_s += network.all_gather(e * elements, group) if c.zero_stage else 0.0
    return gradients_s, weights_s


def _update(dtype: Dtype, c: Candidate, elements: float, cluster: Cluster, memory: float) -> tuple[float, float]:
    """Seconds of offload traffic, and of the update where it is made."""
    if c.offload == "none":
        return 0.0, UPDATE_BYTES * elements / memory
    # Gradients go to the host and weights come back; at stage 3 weights come for each micro-batch.
    moves = BYTES[dtype] * (2 * c.accumulation if c.zero_stage == 3 else 1) + FP32
    traffic_s = moves * elements / cluster.host_link.bytes_per_s
    if c.offload == "nvme":
        traffic_s += 2 * 3 * FP32 * elements * cluster.devices_per_node / cluster.drive_bytes_per_s
    host = cluster.host_memory_bytes_per_s / cluster.devices_per_node
    return traffic_s, UPDATE_BYTES * elements / host
