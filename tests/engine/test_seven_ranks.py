"""Two, four and seven ranks, the numbers of which none divides the next: the state goes on bit for bit, the losses too.

Seven processes on whatever cores there are, with shares that differ in size: the model's numbers have no factor of 7.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import Rank, run_team
from training import FolderSource, live_through, logical_shapes, plain_losses, train_config

from elastictrain.config import TrainConfig

Losses = dict[tuple[int, int], float]

JOURNEY = ((1, 7), (2, 4), (3, 7), (0, 2), (2, 7), (3, 4), (1, 2), (0, 7))
"""(ZeRO stage, world size) of generations, one step each."""
STEPS = range(1, len(JOURNEY) + 1)


def config_of(stage: int) -> TrainConfig:
    return train_config(stage, global_batch=56)  # 28 micro-batches


def journey(me: Rank, folder: Path) -> Losses:
    """One step in each layout; what a generation imported, it exports again before its step."""
    found: Losses = {}
    for generation, (stage, world_size) in enumerate(JOURNEY):
        members = range(world_size) if generation % 2 else range(7 - world_size, 7)
        if me.index in members:
            found |= live_through(me, folder, generation, members, config_of(stage))
        me.meet()
    return found


def test_from_two_to_four_to_seven_and_back(tmp_path: Path) -> None:
    losses: Losses = {}
    for found in run_team(7, journey, tmp_path):
        losses |= found
    shapes = logical_shapes(config_of(1))
    for generation in range(1, len(JOURNEY)):
        stored = FolderSource(tmp_path / f"after{generation - 1}").tensors(shapes)
        loaded = FolderSource(tmp_path / f"imported{generation}").tensors(shapes)
        for name, values in stored.items():
            assert (values == loaded[name]).all(), f"{name} changed between {JOURNEY[generation - 1 : generation + 1]}"
    expected = plain_losses(config_of(1), STEPS)
    assert losses.keys() == expected.keys()
    for (step, index), value in losses.items():
        # Norms are sums over every weight, so they round more.
        bound = 5e-6 if index >= 0 else 1e-4
        assert value == pytest.approx(expected[step, index], abs=bound), f"step {step}, micro-batch {index}"
