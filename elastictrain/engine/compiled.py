"""Kernels of their own for a transformer's blocks, by torch.compile: fewer passes over memory, the same numbers but for
the order of sums, and the same dropout masks.

Each block is compiled by itself, so one compilation serves them all, and those of every later engine of the process:
it is done while a worker warms up, never in a step. What would have to be compiled then runs as it is: a layer of a
kind that is not among a Hugging Face model's first, say. Only layouts whose blocks lie whole in one rank are compiled
(data parallelism and pipelines, ZeRO 0 to 2), with the micro-batch that the worker has warmed up with; activation
checkpointing calls the same kernels. What was compiled is kept in a folder that is the user's alone, for the processes
that come after.

Cost: 15 to 25 s for the first worker on a machine, about 5 s for the next; some 20 MB of host memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from elastictrain.config import TrainConfig
from elastictrain.engine.device import Device
from elastictrain.plan.layout import Layout

COMPILED_FROM_STEPS = 2000
"""Shorter runs are over before the compilation has paid, unless `train.compile` says otherwise."""
_FOLDER = "TORCHINDUCTOR_CACHE_DIR"


def with_compile_decided(config: TrainConfig, device: Device) -> TrainConfig:
    """The config with `train.compile` true or false, as this process can and should."""
    wish = config.train.compile
    if wish is None:
        long = config.train.steps >= COMPILED_FROM_STEPS
        wish = long and config.model.kind != "own" and _has_compiler(device)
    return config.compiling(wish)


def is_compiled(config: TrainConfig, layout: Layout) -> bool:
    """Whether a rank's blocks are compiled in this layout: where a warm-up with this config has compiled the same."""
    whole = layout.zero_stage < 3 and layout.tp == layout.sp == layout.ep == 1
    return bool(config.train.compile) and whole and layout.micro_batch == config.train.micro_batch


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Have each compiled when it is first called."""
    if _FOLDER not in os.environ:
        # torch would take one in /tmp, where anybody may lay out what it then loads
        kept = Path.home() / ".cache" / "elastictrain" / "compiled"
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ[_FOLDER] = str(kept)
    from torch._inductor import config as inductor

    inductor.compile_threads = 1  # others would be processes that outlive this one
    inductor.fallback_random = True  # torch's own dropout masks
    for block in blocks:
        block.compile(dynamic=False)


def compile_no_more() -> None:
    """Have this process use the kernels that it has; what they are not for runs as it is."""
    torch.compiler.set_stance("eager_on_recompile")


def _has_compiler(device: Device) -> bool:
    compiler = os.environ.get("CC", "gcc") if device.is_cuda else os.environ.get("CXX", "g++")
    return shutil.which(compiler) is not None and (not device.is_cuda or find_spec("triton") is not None)
