"""Seeding of everything that a model draws from, as often as every micro-batch.

`torch.manual_seed` does the same, and in a process without GPUs formats the caller's stack each time, for the day on
which CUDA is initialised (`torch.cuda._lazy_call`): 220 us in a stack of twenty, where this takes 2.
"""

from __future__ import annotations

import torch


def seed_draws(seed: int) -> None:
    """Of the host, and of the GPU that this process computes on, if it does; the draws are torch.manual_seed's."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch gives it no types
        torch.cuda.manual_seed(seed)
