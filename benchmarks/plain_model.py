"""The model as a plain script has it: built, and compiled where `train.compile` says so."""

from __future__ import annotations

from typing import cast

from torch import nn

from elastictrain.config import TrainConfig
from elastictrain.engine.compiled import compile_blocks
from elastictrain.workloads.base import SplitWorkload, Workload


def plain_model(workload: Workload, config: TrainConfig) -> nn.Module:
    """The same bits and the same kernels as elastictrain's own where both say the same of `train.compile`."""
    module = workload.build(config.train.seed)
    if config.train.compile:
        compile_blocks(cast(SplitWorkload, workload).blocks(module))
    return module
