"""A layout's ranks as real processes, without Ray: engine, group and model as a run has them, tokens drawn at random.

A fork server imports torch and DeepSpeed once; each rank is a fork of it. A program is a top-level function
`program(rank) -> result`; its result must pickle.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from elastictrain.config import TrainConfig
from elastictrain.engine.base import Phase, StepResult
from elastictrain.engine.build import build_engine
from elastictrain.engine.group import RankGroup, Rendezvous
from elastictrain.engine.zero import ZeroEngine
from elastictrain.plan.layout import Layout
from elastictrain.workloads.base import Batch
from elastictrain.workloads.language_model import LanguageModel

os.environ["OMP_NUM_THREADS"] = "1"  # the fork server inherits it
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "elastictrain.engine.warm",
        "elastictrain.workloads.language_model",
        "deepspeed.runtime.bf16_optimizer",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "torch._inductor.compile_fx",
    ]
)


@dataclass
class Rank:
    """One process's side."""

    index: int
    config: TrainConfig
    layout: Layout
    group: RankGroup

    def build(self) -> ZeroEngine:
        """The engine; all ranks call this together."""
        return build_engine(
            LanguageModel(self.config, self.config.data.vocab_size), self.config, self.layout, self.group
        )

    def micro_batches(self) -> list[tuple[int, Batch]]:
        """One step's, of random tokens."""
        size = (self.layout.micro_batch, self.config.data.seq_len + 1)
        return [
            (j, {"tokens": torch.randint(0, self.config.data.vocab_size, size)})
            for j in range(self.layout.accumulation)
        ]

    def step(self, engine: ZeroEngine, on_phase: Callable[[Phase], None] = lambda phase: None) -> StepResult:
        """One step."""
        return engine.train_step(
            self.micro_batches(), learning_rate=1e-4, before_update=lambda: None, on_phase=on_phase
        )


def run_ranks(config: TrainConfig, world_size: int, program: Callable[[Rank], Any]) -> list[Any]:
    """What the program returns on each of the ranks; raises EOFError when one dies."""
    pipes = [_CONTEXT.Pipe() for _ in range(world_size)]
    processes = [
        _CONTEXT.Process(target=_run, args=(index, world_size, theirs, config.to_dict(), program), daemon=True)
        for index, (_, theirs) in enumerate(pipes)
    ]
    lines: Sequence[Connection] = [ours for ours, _ in pipes]
    try:
        for process, (_, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()
        addresses = [line.recv() for line in lines]
        for line in lines:
            line.send(addresses[0])
        return [line.recv() for line in lines]
    finally:
        for process, line in zip(processes, lines, strict=True):
            line.close()
            process.join(10)
            process.kill()


def _run(index: int, world_size: int, line: Connection, data: dict[str, Any], program: Callable[[Rank], Any]) -> None:
    gc.freeze()
    torch.set_num_threads(1)
    config = TrainConfig.from_dict(data)
    rendezvous = Rendezvous.serve("127.0.0.1")
    line.send(rendezvous.address)
    group = RankGroup(line.recv(), 0, index, world_size)
    group.form()
    with closing(group):
        line.send(program(Rank(index, config, config.layout(world_size), group)))
        group.meet()
