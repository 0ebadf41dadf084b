"""Activation checkpointing, none, selective or full, changes no bit of any loss or gradient norm."""

from __future__ import annotations

import pytest
from ranks import Rank, run_team
from training import train, train_config, workload

from elastictrain.engine.build import build_engine
from elastictrain.plan.space import RECOMPUTES

KINDS: tuple[tuple[int, dict[str, int], str], ...] = (
    (3, {}, "fp32"),
    (1, {"pp": 2}, "bf16"),
    (1, {"tp": 2}, "fp32"),
    (1, {"ep": 2}, "bf16"),
)
"""ZeRO stage, degrees and dtype, on two ranks, with dropout."""
Losses = dict[tuple[int, int], float]


def each_way(me: Rank) -> list[list[Losses]]:
    """Of each kind in turn, the losses with each way of recomputation."""
    found: list[list[Losses]] = []
    for kind, (stage, degrees, dtype) in enumerate(KINDS):
        found.append([])
        for number, recompute in enumerate(RECOMPUTES):
            config = train_config(stage, dtype, degrees=degrees, activation_checkpointing=recompute)
            group = me.group(len(RECOMPUTES) * kind + number, (0, 1))
            group.form()
            engine = build_engine(workload(config), config, config.layout(2), group)
            found[-1].append(train(engine, config, me.index, 2, (1,)))
            engine.close()
            group.close()
    return found


@pytest.fixture(scope="module")
def losses() -> list[list[list[Losses]]]:
    """Of both ranks, see `each_way`."""
    return run_team(2, each_way)


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=lambda kind: str(KINDS[kind]))
def test_no_bit_of_a_loss_is_another(losses: list[list[list[Losses]]], kind: int) -> None:
    for of_rank in losses:
        plain, *others = of_rank[kind]
        assert plain
        assert all(other == plain for other in others)
