"""A mixture of experts shared by ranks: losses of the plain model, and a state that any layout loads bit for bit.

Four processes live through the journey, generation after generation, as survivors of a job do. About 10 s a kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import Rank, run_team
from training import FolderSource, live_through, logical_shapes, plain_losses, train, train_config, workload

from elastictrain.config import TrainConfig
from elastictrain.engine.build import build_engine
from elastictrain.plan.space import RECOMPUTES

Losses = dict[tuple[int, int], float]

JOURNEY = (
    (1, {"ep": 2}, 2),
    (0, {"ep": 2}, 4),
    (3, {}, 2),
    (2, {"ep": 2}, 4),
    (1, {"ep": 4}, 4),
    (0, {}, 1),
    (0, {"ep": 4}, 4),
    (2, {}, 2),
    (1, {"ep": 2}, 4),
    (1, {"pp": 2}, 4),
    (0, {"pp": 2, "ep": 2}, 4),
    (2, {"tp": 2, "ep": 2}, 4),
    (1, {"pp": 2, "ep": 2}, 4),
    (0, {"tp": 2}, 2),
    (1, {"pp": 2, "tp": 2}, 4),
    (0, {"tp": 2, "ep": 2}, 4),
    (3, {"tp": 2}, 4),
    (1, {"tp": 2, "ep": 2}, 4),
    (1, {"ep": 2}, 2),
)
"""(ZeRO stage, degrees, world size) of generations, one step each."""
STEPS = range(1, len(JOURNEY) + 1)


def config_of(stage: int, degrees: dict[str, int], dtype: str, per_token: int, **more: Any) -> TrainConfig:
    if dtype == "bf16" and degrees.keys() & {"ep", "tp"}:
        stage = max(stage, 1)  # DeepSpeed's norm at stage 0 would be wrong
    experts = {"num_experts": 4, "experts_per_token": per_token, "intermediate_size": 96, "load_balance": 0.1}
    return train_config(stage, dtype, degrees=degrees, model=experts, global_batch=8, **more)


def journey(me: Rank, folder: Path, dtype: str, per_token: int) -> Losses:
    """One step in each layout; what a generation imported, it exports again before its step."""
    found: Losses = {}
    for generation, (stage, degrees, world_size) in enumerate(JOURNEY):
        members = range(world_size) if generation % 2 else range(4 - world_size, 4)
        if me.index in members:
            config = config_of(stage, degrees, dtype, per_token, activation_checkpointing=RECOMPUTES[generation % 3])
            found |= live_through(me, folder, generation, members, config)
        me.meet()
    return found


def alone(me: Rank, dtype: str, per_token: int) -> Losses:
    """The same steps on one rank: what bf16 gives there is what it is measured by."""
    config = config_of(1, {}, dtype, per_token)
    group = me.group(0, (0,))
    group.form()
    engine = build_engine(workload(config), config, config.layout(1), group)
    found = train(engine, config, 0, 1, STEPS)
    engine.close()
    group.close()
    return found


@pytest.mark.parametrize(("dtype", "per_token", "tolerance"), [("fp32", 1, 5e-6), ("fp32", 2, 5e-6), ("bf16", 2, 1e-2)])
def test_shared_experts_learn_as_the_plain_model_does(
    tmp_path: Path, dtype: str, per_token: int, tolerance: float
) -> None:
    losses: Losses = {}
    for found in run_team(4, journey, tmp_path, dtype, per_token):
        losses |= found
    config = config_of(1, {}, dtype, per_token)
    for generation in range(1, len(JOURNEY)):
        stored = FolderSource(tmp_path / f"after{generation - 1}").tensors(logical_shapes(config))
        loaded = FolderSource(tmp_path / f"imported{generation}").tensors(logical_shapes(config))
        for name, values in stored.items():
            assert (values == loaded[name]).all(), f"{name} changed between {JOURNEY[generation - 1 : generation + 1]}"
    [expected] = [plain_losses(config, STEPS)] if dtype == "fp32" else run_team(1, alone, dtype, per_token)
    assert losses.keys() == expected.keys()
    for (step, index), value in losses.items():
        # Norms are sums over every weight, so they round more.
        bound = tolerance if index >= 0 else 20 * tolerance
        assert value == pytest.approx(expected[step, index], abs=bound), f"step {step}, micro-batch {index}"
