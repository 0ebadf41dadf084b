"""Compiled blocks train as the plain ones do, and are compiled once in a process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from ranks import Rank, run_team
from training import train, train_config, workload

from elastictrain.config import TrainConfig
from elastictrain.engine.build import build_engine
from elastictrain.engine.compiled import COMPILED_FROM_STEPS, is_compiled, with_compile_decided
from elastictrain.engine.device import Device
from elastictrain.errors import ConfigError
from elastictrain.plan.layout import Layout

CPU = Device(torch.device("cpu"), "gloo")
STEPS = range(1, 5)
Losses = dict[tuple[int, int], float]


def trained(me: Rank, generation: int, config: TrainConfig, steps: Sequence[int]) -> Losses:
    group = me.group(generation, (0,))
    group.form()
    engine = build_engine(workload(config), config, config.layout(1), group)
    found: Losses = train(engine, config, 0, 1, steps)
    engine.close()
    group.close()
    return found


def in_turn(me: Rank, kept: Path) -> tuple[list[Losses], list[int]]:
    """Plain, compiled and compiled again: losses, and compilations so far."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(kept)
    from torch._dynamo.utils import counters

    plain = train_config(1, "fp32")  # with dropout
    compiled = plain.compiling(True)
    found, graphs = [], []
    for generation, config in enumerate((plain, compiled, compiled)):
        found.append(trained(me, generation, config, STEPS))
        graphs.append(counters["stats"]["unique_graphs"])
    assert kept.is_dir()
    return found, graphs


def test_the_losses_are_those_of_the_plain_blocks(tmp_path: Path) -> None:
    [((plain, compiled, again), (before, graphs, graphs_again))] = run_team(1, in_turn, tmp_path / "kept")
    assert before == 0 < graphs
    assert graphs_again == graphs, "a later engine of the same kind is compiled again"
    assert compiled == pytest.approx(plain, abs=5e-5)
    assert again == compiled, "the same kernels give other bits"


@pytest.mark.parametrize(
    ("steps", "wish", "compiler", "compiles"),
    [
        (COMPILED_FROM_STEPS, None, "gcc", True),
        (COMPILED_FROM_STEPS - 1, None, "gcc", False),
        (COMPILED_FROM_STEPS, None, "no-such-compiler", False),
        (COMPILED_FROM_STEPS, False, "gcc", False),
        (1, True, "no-such-compiler", True),  # asked for: tried, and told
    ],
)
def test_long_runs_are_compiled_where_that_can_be(
    steps: int, wish: bool | None, compiler: str, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", shutil.which(compiler) or compiler)
    settings = [f"train.steps={steps}", *([f"train.compile={str(wish).lower()}"] if wish is not None else [])]
    config = with_compile_decided(TrainConfig.load(None, settings), CPU)
    assert config.train.compile is compiles


def test_only_blocks_that_lie_whole_in_a_rank_are_compiled() -> None:
    config = TrainConfig().compiling(True)
    micro_batch = config.train.micro_batch
    assert is_compiled(config, Layout(2, 2, micro_batch, 1))
    assert not is_compiled(config, Layout(2, 3, micro_batch, 1))
    assert not is_compiled(config, Layout(2, 1, micro_batch // 2, 2)), "it would be compiled anew, in a step"
    assert not is_compiled(TrainConfig().compiling(False), Layout(2, 1, micro_batch, 1))


def test_a_model_of_ones_own_is_not_compiled() -> None:
    with pytest.raises(ConfigError, match=r"train.compile true is for model.kind transformer, not own"):
        TrainConfig.load(None, ["model.kind=own", "model.workload=a.py:B", "train.compile=true"])
