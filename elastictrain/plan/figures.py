"""What is known of the machines before anything runs on them (pure): Ray's resources as the planner's `Cluster`.

    GPUs      the type that Ray found, and its maker's figures; of other types nothing is known
    CPUs      the memory that Ray gives a node, shared by the workers that it may get; speeds are a guess, so that a
              layout changes for its memory, not for its time (`Cluster.time_error`)

The memory that Ray gives a node with GPUs is what offloaded state has; on CPUs it is the workers' own.

`cluster.device_memory` overrides the memory. Only sizes that never change count, so the same cluster always gives the
same figures; the one that may is a CPU node's memory, which Ray takes at its start from what is free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastictrain.plan.cluster import Cluster, Device, Efficiency, Link

GUESSED_ERROR = 1.0
"""`Cluster.time_error` of guessed speeds: what is to be faster must take half the time."""
GPU_RESERVED_BYTES = 2_500_000_000
CPU_RESERVED_BYTES = 500_000_000
ASSUMED_HOST_BYTES = 64 * 2**30
"""Of a node with GPUs that does not say; only offloaded state needs it."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the maker states: bytes a second in one direction, operations without sparsity."""

    memory_bytes: int
    bf16_flops: float
    fp32_flops: float
    memory_bytes_per_s: float
    link_bytes_per_s: float


GPUS = {
    "H200": Gpu(141 * 10**9, 989e12, 67e12, 4.8e12, 450e9),
    "H100": Gpu(80 * 2**30, 989e12, 67e12, 3.35e12, 450e9),
    "A100-80G": Gpu(80 * 2**30, 312e12, 19.5e12, 2.04e12, 300e9),
    "A100": Gpu(40 * 2**30, 312e12, 19.5e12, 1.56e12, 300e9),
}
"""By a part of the name, the first that matches."""


@dataclass(frozen=True, slots=True)
class Figures:
    """A cluster as far as it is known."""

    cluster: Cluster
    known: bool
    """Whether its memory is known at all."""
    firm: bool
    """Whether that is sure enough to refuse what does not fit."""


def figures_of(
    nodes: Sequence[Mapping[str, float]], demand: Mapping[str, float], given: int | None, most_workers: int
) -> Figures:
    """Of Ray's nodes (resources by name), on which at most so many workers take `demand` each.

    `given` are the bytes of memory that each may use.
    """
    slots = [min(int(node.get(kind, 0) // amount) for kind, amount in demand.items()) for node in nodes]
    with_room = [(node, count) for node, count in zip(nodes, slots) if count]
    per_node = min((count for _, count in with_room), default=1)
    if "GPU" in demand:
        gpu = _gpu_of([node for node, _ in with_room])
        known = given is not None or gpu is not None
        device = _gpu_device(gpu or GPUS["A100"], given)
        link = (gpu or GPUS["A100"]).link_bytes_per_s
        error = None if gpu else GUESSED_ERROR
        told = min((int(node["memory"]) for node, _ in with_room if node.get("memory")), default=ASSUMED_HOST_BYTES)
        cluster = _cluster(len(with_room), per_node, device, link, Efficiency(), error, host_memory_bytes=told)
        return Figures(cluster, known, known)
    shares = [int(node["memory"]) // min(count, most_workers) for node, count in with_room if node.get("memory")]
    device = Device(
        name="a CPU core with its share of the memory",
        memory_bytes=given or min(shares, default=ASSUMED_HOST_BYTES),
        flops={"fp32": 5e10, "bf16": 5e10},
        memory_bytes_per_s=1e10,
        reserved_bytes=CPU_RESERVED_BYTES,
    )
    busy = Efficiency(micro_batch_s=5e-3, step_s=5e-3, gathered_layer_s=2e-3)
    cluster = _cluster(len(with_room), per_node, device, 1e9, busy, GUESSED_ERROR)
    return Figures(cluster, given is not None or bool(shares), given is not None)


def gpu_named(name: str) -> Gpu | None:
    """The figures of a GPU, by Ray's name of it or by its maker's."""
    name = "A100-80G" if "A100" in name and "80G" in name else name
    return next((gpu for part, gpu in GPUS.items() if part in name), None)


def _gpu_of(nodes: Sequence[Mapping[str, float]]) -> Gpu | None:
    """The leanest of the cluster's types; None where there is one that is not known."""
    types = {kind.removeprefix("accelerator_type:") for node in nodes for kind in node if "accelerator_type:" in kind}
    found = [gpu_named(name) for name in sorted(types)]
    if not found or None in found:
        return None
    return min((gpu for gpu in found if gpu), key=lambda gpu: gpu.memory_bytes)


def _gpu_device(gpu: Gpu, given: int | None) -> Device:
    return Device(
        name="GPU",
        memory_bytes=given or gpu.memory_bytes,
        flops={"bf16": gpu.bf16_flops, "fp32": gpu.fp32_flops},
        memory_bytes_per_s=gpu.memory_bytes_per_s,
        reserved_bytes=GPU_RESERVED_BYTES,
        fragmentation=0.05,
    )


def _cluster(
    num_nodes: int,
    per_node: int,
    device: Device,
    link: float,
    efficiency: Efficiency,
    error: float | None,
    host_memory_bytes: int = 0,
) -> Cluster:
    cluster = Cluster(
        name="Ray's cluster",
        num_nodes=max(1, num_nodes),
        devices_per_node=per_node,
        device=device,
        within_node=Link(bytes_per_s=link, latency_s=3e-6 if "GPU" in device.name else 1e-4),
        between_nodes=Link(bytes_per_s=min(link, 12.5e9), latency_s=2e-5 if "GPU" in device.name else 1e-4),
        host_link=Link(bytes_per_s=25e9),
        host_memory_bytes=host_memory_bytes,
        host_memory_bytes_per_s=200e9,
        efficiency=efficiency,
    )
    return cluster if error is None else cluster.model_copy(update={"time_error": error})
