"""Two processes that train and do nothing else: what overhead.py measures this platform against.

Processes of torch.multiprocessing, a gloo group over a file, the loop of plain_deepspeed.py, or another one. No Ray, no
copies of the state, no journal. One thread computes in each process, as in a Ray worker with one CPU. Each rank appends
one JSON line for each step: when it ended, and the losses of its micro-batches where the loop tells them.

    python benchmarks/bare_loop.py setup.json         trains until it is ended; see `Setup`
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from plain_ddp import DdpRank
from plain_deepspeed import PlainRank
from plain_fsdp import FsdpRank
from plain_trainer import TrainerRank
from torch.multiprocessing.spawn import spawn
from two_nodes import end_on_sigterm, free_port

from elastictrain.config import TrainConfig
from elastictrain.engine.device import prepare_process
from elastictrain.runtime.allocator import keep_memory

RAY_NICENESS = 15
"""Of all that Ray runs for users. At 0 the loop would win against other work on the machine and Ray's workers lose."""


@dataclass(frozen=True, slots=True)
class Setup:
    """One job."""

    config: dict[str, Any]
    """An elastictrain config; model, data, optimisation and ZeRO stage are taken from it."""
    data_folder: str
    """Token shards that elastictrain has prepared."""
    world_size: int
    folder: str
    """Takes the ranks' lines."""
    loop: str = "deepspeed"
    """Whose: deepspeed, ddp, fsdp2 or trainer."""
    same_allocator: bool = False
    """With malloc set up as in elastictrain's workers."""
    port: int = field(default_factory=free_port)
    """For ranks that can't meet in a file."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What was done, by step from 1."""

    ends: dict[int, float]
    """When the last rank ended the step, unix time."""
    losses: dict[int, float]
    """As elastictrain computes them: the mean over the micro-batches of all ranks in their order."""


def read(folder: Path, world_size: int) -> Trained:
    """The steps that all ranks have told of so far."""
    told = [_lines(folder / f"rank-{rank}.jsonl") for rank in range(world_size)]
    # the ranks are at most a step apart
    steps = list(zip(*told, strict=False))
    ends = [max(rank["ended_at"] for rank in step) for step in steps]
    losses = {number: [rank["losses"] for rank in step] for number, step in enumerate(steps, 1)}
    return Trained(dict(enumerate(ends, 1)), {number: _mean(told) for number, told in losses.items() if all(told)})


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _mean(of_ranks: list[list[float]]) -> float:
    # rank r computes the micro-batches r, r + world size, ...
    in_order = [loss for turn in zip(*of_ranks, strict=True) for loss in turn]
    return math.fsum(in_order) / len(in_order)


def _rank(rank: int, setup: Setup) -> None:
    if setup.same_allocator:
        keep_memory()
    torch.set_num_threads(1)
    os.nice(RAY_NICENESS)
    prepare_process(lean=False)
    job = TrainConfig.from_dict(setup.config), Path(setup.data_folder), rank, setup.world_size
    with open(Path(setup.folder, f"rank-{rank}.jsonl"), "w", buffering=1) as file:

        def ended(losses: list[float] | None = None) -> None:
            file.write(json.dumps({"ended_at": time.time(), "losses": losses or []}) + "\n")

        if setup.loop == "trainer":
            TrainerRank(*job, setup.port).train(ended)
        rendezvous = f"file://{setup.folder}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=setup.world_size)
        training = {"deepspeed": PlainRank, "ddp": DdpRank, "fsdp2": FsdpRank}[setup.loop](*job)
        training.begin(1)
        step = 0
        while True:
            step += 1
            ended(training.step(step))


if __name__ == "__main__":
    job = Setup(**json.loads(Path(sys.argv[1]).read_text()))
    end_on_sigterm()
    spawn(_rank, (job,), nprocs=job.world_size, daemon=True)  # type: ignore[no-untyped-call]  # torch's
