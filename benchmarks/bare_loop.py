"""Two processes that train with DeepSpeed and do nothing else: what overhead.py measures this platform against.

Processes of torch.multiprocessing, a gloo group over a file, the loop of plain_deepspeed.py. No Ray, no copies of the
state, no journal. One thread computes in each process, as in a Ray worker with one CPU.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from elastictrain.config import TrainConfig


@dataclass(frozen=True, slots=True)
class BareRun:
    """What the loop did."""

    ends: list[float]
    """When the slower rank ended each step, unix time."""
    losses: list[float]
    """Of each step, as elastictrain computes them: the mean over all micro-batches in their order."""


def run(config: dict[str, Any], data_folder: Path, world_size: int, folder: Path) -> BareRun:
    """Train `train.steps` steps."""
    queue: Queue[tuple[int, list[float], list[list[float]]]] = mp.get_context("spawn").Queue()
    arguments = (config, str(data_folder), world_size, str(folder / "rendezvous"), queue)
    context = mp.spawn(_rank, arguments, nprocs=world_size, join=False)
    told = sorted(queue.get() for _ in range(world_size))
    while not context.join():
        pass
    ends = [max(at) for at in zip(*(rank_ends for _, rank_ends, _ in told), strict=True)]
    per_step = zip(*(rank_losses for _, _, rank_losses in told), strict=True)
    # rank r computes micro-batches r, r + world_size, ...
    in_order = [[loss for turn in zip(*ranks, strict=True) for loss in turn] for ranks in per_step]
    return BareRun(ends, [_mean(losses) for losses in in_order])


def _mean(values: list[float]) -> float:
    import math

    return math.fsum(values) / len(values)


def _rank(
    rank: int, config: dict[str, Any], data_folder: str, world_size: int, rendezvous: str, queue: Queue[Any]
) -> None:
    import torch
    import torch.distributed as dist
    from plain_deepspeed import PlainRank

    from elastictrain.engine.device import prepare_process

    torch.set_num_threads(1)
    prepare_process()
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    settings = TrainConfig.from_dict(config)
    training = PlainRank(settings, Path(data_folder), rank, world_size)
    training.begin(1)
    ends, losses = [], []
    for step in range(1, settings.train.steps + 1):
        losses.append(training.step(step))
        ends.append(time.time())
    training.close()
    queue.put((rank, ends, losses))
    dist.destroy_process_group()
