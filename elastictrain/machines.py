"""Where a run would go, for the planner: a cluster file, or this machine as it is found.

Detection asks `nvidia-smi` for GPUs; their speeds are the maker's. Without GPUs a worker is a core with its share of
the memory, and the speeds are measured: half a second, after the import of torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml
from pydantic import ValidationError

from elastictrain.errors import ConfigError
from elastictrain.plan.cluster import Cluster, Device, Dtype, Link
from elastictrain.plan.figures import CPU_RESERVED_BYTES, GPU_RESERVED_BYTES, gpu_named

MEASURED_S = 0.1
"""Seconds that each speed is measured for."""


def read_cluster(path: Path) -> Cluster:
    """A cluster file; raises ConfigError that names the field."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"can't read the cluster file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    try:
        return Cluster.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path}: {problems}. clusters/hardware/h100x8.yaml has every field") from None


def this_machine(num_workers: int) -> Cluster:
    """This machine; without GPUs, `num_workers` workers share its memory, each with a core."""
    host_bytes = available_bytes()
    return _with_gpus(host_bytes) or _without(host_bytes, num_workers)


def available_bytes() -> int:
    """Memory that is free for processes here: the host's, or less where a control group says so."""
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(rows["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (maximum := limit.read_text().strip()) != "max":
        available = min(available, int(maximum) - int(used.read_text()))
    return available


def _with_gpus(host_bytes: int) -> Cluster | None:
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    rows = [row.rsplit(",", 1) for row in done.stdout.strip().splitlines()]
    if done.returncode or not rows:
        return None
    name, mebibytes = rows[0][0].strip(), int(rows[0][1])
    gpu = gpu_named(name)
    if gpu is None:
        raise ConfigError(
            f"the speeds of {name} are not known here: describe it in a file like clusters/hardware/h100x8.yaml and "
            "give that with --cluster"
        )
    device = Device(
        name=name,
        memory_bytes=mebibytes * 1024**2,
        flops={"bf16": gpu.bf16_flops, "fp32": gpu.fp32_flops},
        memory_bytes_per_s=gpu.memory_bytes_per_s,
        reserved_bytes=GPU_RESERVED_BYTES,
        fragmentation=0.05,
    )
    return Cluster(
        name="this machine",
        num_nodes=1,
        devices_per_node=len(rows),
        device=device,
        within_node=Link(bytes_per_s=gpu.link_bytes_per_s, latency_s=3e-6),
        between_nodes=Link(bytes_per_s=12.5e9, latency_s=2e-5),
        host_link=Link(bytes_per_s=25e9),
        host_memory_bytes=host_bytes,
        host_memory_bytes_per_s=200e9,
    )


def _without(host_bytes: int, num_workers: int) -> Cluster:
    flops, memory_bytes_per_s = _measure()
    loopback = Link(bytes_per_s=memory_bytes_per_s / 8, latency_s=1e-4)
    return Cluster(
        name="this machine",
        num_nodes=1,
        devices_per_node=max(num_workers, len(os.sched_getaffinity(0))),
        device=Device(
            name="a CPU core with its share of the memory",
            memory_bytes=host_bytes // num_workers,
            flops=flops,
            memory_bytes_per_s=memory_bytes_per_s,
            reserved_bytes=CPU_RESERVED_BYTES,
        ),
        within_node=loopback,
        between_nodes=loopback,
        host_link=Link(bytes_per_s=memory_bytes_per_s),
        host_memory_bytes=0,
        host_memory_bytes_per_s=memory_bytes_per_s,
    )


def _measure() -> tuple[dict[Dtype, float], float]:
    """Floating point operations a second of one core by dtype, and bytes a second that it reads and writes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        flops: dict[Dtype, float] = {}
        types: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
        for name, dtype in types.items():
            square = torch.ones(512, 512, dtype=dtype)
            flops[name] = 2 * 512**3 * _per_s(partial(torch.matmul, square, square))
        source, target = torch.ones(2, 16 * 1024**2).unbind()
        return flops, 2 * source.nbytes * _per_s(partial(target.copy_, source))
    finally:
        torch.set_num_threads(threads)


def _per_s(work: Callable[[], object]) -> float:
    """Times a second, after one to warm up."""
    work()
    begun, times = time.perf_counter(), 0
    while (passed := time.perf_counter() - begun) < MEASURED_S:
        work()
        times += 1
    return times / passed
