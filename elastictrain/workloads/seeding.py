"""Seeding of everything that a model draws from, as often as every micro-batch.

`torch.manual_seed` will not do: in a process without GPUs each call leaves a formatted stack for the day on which CUDA
is initialised (`torch.cuda._lazy_call`), 15 KB a time, which is gigabytes in a long run.
"""

from __future__ import annotations

import torch


def seed_draws(seed: int) -> None:
    """Of the host, and of the GPU that this process computes on, if it does; the draws are torch.manual_seed's."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.init()  # type: ignore[no-untyped-call]  # torch's; else this call would be queued too
        torch.cuda.manual_seed(seed)
