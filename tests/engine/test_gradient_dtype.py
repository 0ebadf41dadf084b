"""Gradients that travel as bf16 or int8: the same sequences learned as with fp32, to a stated tolerance. About 20 s."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ranks import Rank, run_team
from training import ignore, micro_batch, plain_losses, train, train_config, workload

from elastictrain.config import TrainConfig
from elastictrain.engine.build import build_engine
from elastictrain.engine.quantized import scattered_mean
from elastictrain.errors import ConfigError

Losses = dict[tuple[int, int], float]
KINDS: list[tuple[str, int, str, dict[str, int]]] = [
    ("bf16", 0, "fp32", {}),
    ("bf16", 1, "fp32", {"pp": 2}),
    ("bf16", 1, "bf16", {}),
    ("bf16", 1, "fp32", {"tp": 2}),
    ("bf16", 2, "fp32", {}),
    ("bf16", 3, "fp32", {}),
    ("int8", 3, "fp32", {}),
    ("int8", 3, "bf16", {"sp": 2}),
]
"""(parallel.gradient_dtype, ZeRO stage, train.dtype, degrees)"""
REPEATED = [1] * 12
"""Steps over the same micro-batches, so that their loss falls."""


def config_of(gradients: str, stage: int, dtype: str, degrees: dict[str, int]) -> TrainConfig:
    return train_config(stage, dtype, degrees=degrees, gradient_dtype=gradients, model={"dropout": 0.0}, grad_clip=1.0)


def each_kind(me: Rank) -> list[Losses]:
    """The last losses of each kind; after them, a step that is refused for its loss."""
    found: list[Losses] = []
    for generation, kind in enumerate(KINDS):
        config, members = config_of(*kind), range(4 if kind[3] else 3)
        found.append({})
        if me.index in members:
            group = me.group(generation, members)
            group.form()
            layout = config.layout(len(members))
            engine = build_engine(workload(config), config, layout, group)
            found[-1] = train(engine, config, me.index, len(members), REPEATED)
            batches = [micro_batch(9, j) for j in range(layout.accumulation)]
            refused = engine.train_step(
                batches, learning_rate=1e-2, loss_limit=0.1, before_update=ignore, on_phase=ignore
            )
            assert not refused.updated
            engine.close()
            group.close()
        me.meet()
    return found


def test_the_losses_fall_as_they_do_with_fp32() -> None:
    ranks = run_team(4, each_kind)
    plain = config_of("fp32", 1, "fp32", {})
    before, expected = plain_losses(plain, [1]), plain_losses(plain, REPEATED)
    for kind, parts in zip(KINDS, zip(*ranks, strict=True), strict=True):
        losses = {k: v for part in parts for k, v in part.items()}
        assert losses.keys() == expected.keys()
        tolerance = {"bf16": 2e-3, "int8": 3e-2}[kind[0]] if kind[2] == "fp32" else 3e-2
        for (step, index), loss in expected.items():
            if index >= 0:
                assert loss < before[step, index] - 2.5
                assert losses[step, index] == pytest.approx(loss, abs=tolerance), f"{kind}, micro-batch {index}"
            else:
                assert losses[step, index] == pytest.approx(loss, rel=0.02), kind


SHAPES = [(301, 7), (5,), (1,), (64, 64), (2, 3, 11)]


def drawn(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=generator) * 10.0**-i for i, shape in enumerate(SHAPES)]


def mean_of_parts(me: Rank) -> tuple[list[Any], list[bool]]:
    group = me.group(0, range(3))
    group.form()
    parts = [part.numpy() for part in scattered_mean(drawn(me.index))]
    spoiled = [torch.full((600,), float("nan") if me.index == 1 else 1.0), torch.ones(600)]
    finite = [bool(part.isfinite().any()) for part in scattered_mean(spoiled)]
    group.close()
    return parts, finite


def test_parts_of_any_shape_are_rounded_once() -> None:
    found = run_team(3, mean_of_parts)
    gradients = [drawn(rank) for rank in range(3)]
    # half a step, of which the largest number of a block is 127 away from zero
    bound = max(float(g.abs().max()) for parts in gradients for g in parts) / 254
    for number, of_ranks in enumerate(zip(*gradients, strict=True)):
        mean = torch.from_numpy(np.concatenate([parts[number] for parts, _ in found])).view(SHAPES[number])
        assert (mean - sum(of_ranks) / 3).abs().max() <= bound
    for _, finite in found:
        assert finite == [False, True]


def test_what_can_not_be_is_refused_early() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.gradient_dtype int8 needs parallel\.zero_stage 3, not 1"):
        TrainConfig.from_dict({"parallel": {"gradient_dtype": "int8"}})
