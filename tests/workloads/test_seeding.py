"""Draws follow the seed, and a long run leaves nothing behind."""

from __future__ import annotations

import torch

from elastictrain.workloads.seeding import seed_draws


def test_draws_are_those_of_torchs_own_seeding() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(5)
    seed_draws(7)
    assert torch.equal(torch.rand(5), wanted)


def test_nothing_is_left_for_later() -> None:
    before = len(torch.cuda._queued_calls)  # type: ignore[attr-defined]  # where torch.manual_seed leaves a stack
    for seed in range(10):
        seed_draws(seed)
    assert len(torch.cuda._queued_calls) == before  # type: ignore[attr-defined]
