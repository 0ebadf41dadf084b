"""Which device and collective backend this rank uses, and what the process must look like before deepspeed is imported.

DeepSpeed reads its accelerator from the environment when it is imported, so `prepare_process` comes first; that is
also why this room imports deepspeed inside functions. Every rank sees at most one accelerator, its own (Ray sets
CUDA_VISIBLE_DEVICES), so the local rank is always 0. Cost: the import of torch, nothing more.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from elastictrain.engine.lean_import import import_deepspeed

_LEAVE_FAILURES_TO_US = {
    # When a peer is lost, torch's watchdog of nccl would end this process, and with it the state that survived here.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    # Before that it tells all ranks to write down what they were doing, and waits until they have.
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    # It has a watchdog of its own, which ends the process when it waits for too long.
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}


@dataclass(frozen=True, slots=True)
class Device:
    """Where this rank computes, and through what its collectives go."""

    torch_device: torch.device
    backend: Literal["nccl", "gloo"]

    @property
    def is_cuda(self) -> bool:
        """Whether copies to the host cross a bus."""
        return self.torch_device.type == "cuda"

    def memory_in_use(self) -> int:
        """Bytes: of a GPU all that is in use, by whoever; of the host what this process has of its own.

        Both hold what was used once and is kept for the next step, so a peak shows until it is given back.
        """
        if self.is_cuda:
            free, whole = torch.cuda.mem_get_info(self.torch_device)
            return int(whole - free)
        rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(rows["RssAnon"].split()[0]) * 1024


def current_device() -> Device:
    """The accelerator that this process sees, else the CPU."""
    if torch.cuda.is_available():
        return Device(torch.device("cuda", 0), "nccl")
    return Device(torch.device("cpu"), "gloo")


def use_threads(cpus: float) -> None:
    """Have this thread compute with a thread for each whole CPU of a worker, unless the process was started otherwise.

    Ray sets OMP_NUM_THREADS so where it has reserved the CPUs. A standby has none yet: with one thread it would take
    the rank of another that had eight, and be slow, with sums in another order.
    """
    if b"\0OMP_NUM_THREADS=" not in b"\0" + Path("/proc/self/environ").read_bytes():
        torch.set_num_threads(max(int(cpus), 1))


def prepare_process(lean: bool = True) -> Device:
    """Set up the process for DeepSpeed, import it, and return the device; idempotent. The first call takes 0.3 s.

    Not `lean`, DeepSpeed brings along what it brings to every script: see `lean_import`.
    """
    device = current_device()
    if device.is_cuda:
        os.environ.update(_LEAVE_FAILURES_TO_US)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # deepspeed.initialize asserts on it, and no launcher has set it.
    os.environ.setdefault("LOCAL_RANK", "0")

    if lean:
        import_deepspeed()
    import deepspeed.ops
    import deepspeed.runtime.bf16_optimizer

    # The shared-memory all-reduce is compiled at first use, assumes that all ranks share a host, and leaves 69 MB a
    # rank in /dev/shm. Declaring it unavailable here also saves DeepSpeed from trying compilers to find out.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    # BF16_Optimizer prints memory statistics, each after a full garbage collection, and has no option to stop it.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = _no_memory_report
    # DeepSpeed calls collectives under names that torch has renamed; it says so at every engine.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    return device


def _no_memory_report(message: str, force: bool = False) -> None:
    return None
