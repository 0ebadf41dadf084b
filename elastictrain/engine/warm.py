"""Making a process ready before it has a rank.

The first engine of a process costs seconds (imports, generated code, first use of kernels and threads), the next ones
milliseconds. `warm` pays for the first with a group of one rank, two steps and an export, so that a standby or a fresh
worker takes a rank in well under a second. The model that it does this with has few layers (`WARM_LAYERS`): that of a
run may need many workers' memory. Cost: 2 to 5 s, once; half a minute where it compiles.
"""

from __future__ import annotations

import gc
from contextlib import closing

import torch

from elastictrain.config import TrainConfig
from elastictrain.engine.build import build_engine
from elastictrain.engine.device import prepare_process
from elastictrain.engine.group import RankGroup, Rendezvous
from elastictrain.plan.layout import Layout
from elastictrain.workloads.base import Batch, Workload

WARM_LAYERS = 2
"""Of the model to warm up with: the same code runs as with more."""


def warm(workload: Workload, config: TrainConfig, zero_stage: int, micro_batch: Batch) -> None:
    """Build, step and tear down an engine of this kind in a world of one; leaves nothing but a warm process.

    What the model's code raises, and torch.compile where `config.train.compile` is true, is passed on.
    """
    # What is imported stays: later collections need not walk it, which takes them from 0.4 s to a few ms.
    prepare_process()
    gc.freeze()
    # Two micro-batches: accumulating takes paths of its own.
    samples = len(next(iter(micro_batch.values())))
    layout = Layout(1, zero_stage, samples, 2)
    rendezvous = Rendezvous.serve("127.0.0.1")
    group = RankGroup(rendezvous.address, 0, 0, 1)
    group.form()
    with closing(group), closing(build_engine(workload, config, layout, group)) as engine:
        for seed in (0, 1):
            engine.train_step(
                [(seed, micro_batch)] * layout.accumulation,
                learning_rate=0.0,
                before_update=lambda: None,
                on_phase=lambda phase: None,
            )
        engine.export_into(torch.empty(engine.shard_index().numel, dtype=torch.float32))
    gc.collect()
    gc.freeze()  # what the engine has made for good, and its late imports
