"""Ranks that share sequences: the losses of the plain model, whatever ZeRO shards, however the heads fall. About 20 s.

Four processes live through the journey, generation after generation, as survivors of a job do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import Rank, run_team
from training import ignore, live_through, micro_batch, plain_losses, train, train_config, workload

from elastictrain.config import TrainConfig
from elastictrain.engine.build import build_engine
from elastictrain.errors import ConfigError
from elastictrain.plan.space import RECOMPUTES

Losses = dict[tuple[int, int], float]

JOURNEY = (
    (1, {"sp": 2}, 2),
    (0, {"sp": 2}, 4),
    (3, {"sp": 2}, 4),
    (2, {"sp": 4}, 4),
    (1, {}, 3),
    (1, {"sp": 2}, 4),
    (3, {"sp": 2}, 2),
    (0, {"sp": 4}, 4),
    (1, {"pp": 2, "tp": 2}, 4),
    (2, {"sp": 2}, 4),
    (1, {"sp": 2, "tp": 2}, 4),
    (0, {"sp": 2, "pp": 2}, 4),
    (3, {"sp": 2, "tp": 2}, 4),
    (1, {"sp": 2, "pp": 2}, 4),
    (0, {"sp": 2, "tp": 2}, 4),
    (1, {"sp": 2}, 2),
)
"""(ZeRO stage, degrees, world size) of generations, one step each."""
STEPS = range(1, len(JOURNEY) + 1)


def config_of(
    stage: int, degrees: dict[str, int], num_kv_heads: int, dropout: float = 0.0, dtype: str = "fp32", **more: Any
) -> TrainConfig:
    if dtype == "bf16" and "tp" in degrees:
        stage = max(stage, 1)  # 0 is not run
    model = {"num_kv_heads": num_kv_heads, "dropout": dropout}
    return train_config(stage, dtype, degrees=degrees, model=model, **more)


def journey(me: Rank, folder: Path, num_kv_heads: int, dtype: str) -> Losses:
    """One step in each layout; what a generation imported, it exports again before its step."""
    found: Losses = {}
    for generation, (stage, degrees, world_size) in enumerate(JOURNEY):
        members = range(world_size) if generation % 2 else range(4 - world_size, 4)
        if me.index in members:
            again = RECOMPUTES[generation % 3]
            config = config_of(stage, degrees, num_kv_heads, dtype=dtype, activation_checkpointing=again)
            found |= live_through(me, folder, generation, members, config)
        me.meet()
    return found


def alone(me: Rank, num_kv_heads: int, dtype: str) -> Losses:
    """The same steps on one rank: what bf16 gives there is what it is measured by."""
    config = config_of(1, {}, num_kv_heads, dtype=dtype)
    group = me.group(0, (0,))
    group.form()
    engine = build_engine(workload(config), config, config.layout(1), group)
    found = train(engine, config, 0, 1, STEPS)
    engine.close()
    group.close()
    return found


@pytest.mark.parametrize(
    ("num_kv_heads", "dtype", "tolerance"), [(4, "fp32", 5e-6), (2, "fp32", 5e-6), (2, "bf16", 1e-2)]
)
def test_the_losses_are_those_of_whole_sequences(
    tmp_path: Path, num_kv_heads: int, dtype: str, tolerance: float
) -> None:
    """With two heads of keys and values, four ranks that share a sequence have each of them twice."""
    losses: Losses = {}
    for found in run_team(4, journey, tmp_path, num_kv_heads, dtype):
        losses |= found
    plain = config_of(1, {}, num_kv_heads)
    [expected] = [plain_losses(plain, STEPS)] if dtype == "fp32" else run_team(1, alone, num_kv_heads, dtype)
    assert losses.keys() == expected.keys()
    for (step, index), value in losses.items():
        # Norms are sums over every weight, so they round more.
        bound = tolerance if index >= 0 else 20 * tolerance
        assert value == pytest.approx(expected[step, index], abs=bound), f"{JOURNEY[step - 1]}, micro-batch {index}"


def disturbed(me: Rank, degrees: dict[str, int]) -> tuple[list[Losses], list[bool]]:
    """The same steps with dropout twice; and whether two steps more are refused for their loss."""
    runs, refused = [], []
    config = config_of(1, degrees, 2, dropout=0.1)
    for generation in range(2):
        group = me.group(generation, range(4))
        group.form()
        engine = build_engine(workload(config), config, config.layout(4), group)
        runs.append(train(engine, config, me.index, 4, range(1, 4)))
        if generation:
            layout = config.layout(4)
            place, each = layout.place(me.index), layout.accumulation
            batches = [micro_batch(9, each * place.dp + j) for j in range(each)]
            tells = place.sp == place.tp == 0 and place.pp == layout.pp - 1
            for limit in (0.5, 100.0):
                result = engine.train_step(
                    batches, learning_rate=1e-2, loss_limit=limit, before_update=ignore, on_phase=ignore
                )
                refused.append(not result.updated)
                assert len(result.known_losses) == 6
                told = result.known_losses[each * place.dp : each * (place.dp + 1)]
                assert result.losses == (told if tells else ())
        engine.close()
        group.close()
        me.meet()
    return runs, refused


@pytest.mark.parametrize("degrees", [{"sp": 2}, {"sp": 2, "tp": 2}, {"sp": 2, "pp": 2}], ids=str)
def test_dropout_is_the_same_every_time_and_a_high_loss_is_seen_by_all(degrees: dict[str, int]) -> None:
    for (first, second), refused in run_team(4, disturbed, degrees):
        assert first == second
        assert refused == [True, False]


def test_dropout_differs_between_shares_of_a_sequence() -> None:
    from elastictrain.workloads.transformer import block_seed

    assert len({block_seed(7, block, share) for block in range(3) for share in range(3)}) == 9
    assert block_seed(7, 1) == block_seed(7, 1, 0)


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"parallel": {"sp": 2}, "model": {"num_experts": 4}}, "parallel.sp 2 does not go with model.num_experts 4"),
        (
            {"parallel": {"sp": 2, "tp": 4}, "model": {"num_heads": 4}},
            "parallel.sp 2 workers can't share the 1 of 4 attention heads that parallel.tp 4 leaves a worker evenly",
        ),
        ({"parallel": {"sp": 3}, "model": {"num_heads": 4}}, "parallel.sp 3 workers can't share sequences of data.seq"),
        ({"parallel": {"sp": 8}, "model": {"num_heads": 4}}, "parallel.sp 8 workers can't share 4 attention heads"),
        ({"parallel": {"sp": 2}, "elastic": {"max_workers": 3}}, "x parallel.sp 2 = 2 workers. Set elastic.max_work"),
    ],
)
def test_what_can_not_be_is_refused_early(sections: dict[str, dict[str, Any]], problem: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        TrainConfig.from_dict({"elastic": {"max_workers": 8}} | sections)
    assert problem in str(refusal.value)
