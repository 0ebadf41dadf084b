"""Draws follow the seed as they do with torch's own seeding."""

from __future__ import annotations

import torch

from elastictrain.workloads.seeding import seed_draws


def test_draws_are_those_of_torchs_own_seeding() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(5)
    seed_draws(7)
    assert torch.equal(torch.rand(5), wanted)
