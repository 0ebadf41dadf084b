"""Compiled blocks train as the plain ones do, in pipelines too, and are compiled once in a process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from ranks import Rank, run_team
from training import VOCAB_SIZE, micro_batch, train, train_config, workload

from elastictrain.config import TrainConfig
from elastictrain.engine.build import build_engine
from elastictrain.engine.compiled import COMPILED_FROM_STEPS, compile_no_more, is_compiled, with_compile_decided
from elastictrain.engine.device import Device
from elastictrain.engine.warm import WARM_LAYERS, warm
from elastictrain.errors import ConfigError
from elastictrain.plan.layout import Layout
from elastictrain.workloads import build_workload

CPU = Device(torch.device("cpu"), "gloo")
STEPS = range(1, 5)
Losses = dict[tuple[int, int], float]
Trained = list[tuple[Losses, int]]
"""Of a rank in turn: losses, and compilations so far."""


def trained(me: Rank, generation: int, config: TrainConfig, members: Sequence[int]) -> Losses:
    group = me.group(generation, members)
    group.form()
    engine = build_engine(workload(config), config, config.layout(len(members)), group)
    found: Losses = train(engine, config, members.index(me.index), len(members), STEPS)
    engine.close()
    group.close()
    return found


def in_turn(me: Rank, kept: Path) -> Trained:
    """Plain, compiled and compiled again, alone and then as the stage of a pipeline."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(kept)
    from torch._dynamo.utils import counters

    found: Trained = []

    def turn(config: TrainConfig, members: Sequence[int]) -> None:
        losses = trained(me, len(found), config, members)
        found.append((losses, counters["stats"]["unique_graphs"]))

    plain, staged = train_config(1, "fp32"), train_config(1, "fp32", degrees={"pp": 2})  # with dropout
    if me.index:
        me.meet()  # the second finds the first one's kernels in the folder
    for config in (plain, plain.compiling(True), plain.compiling(True)):
        turn(config, (me.index,))
    if not me.index:
        me.meet()
    full, selective = (
        train_config(1, "fp32", degrees={"pp": 2}, activation_checkpointing=way) for way in ("full", "selective")
    )
    for config in (staged, staged.compiling(True), full.compiling(True), selective.compiling(True)):
        turn(config, (0, 1))
    assert kept.is_dir()
    return found


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> list[Trained]:
    """Of both ranks."""
    return run_team(2, in_turn, tmp_path_factory.mktemp("kernels") / "kept")


def test_the_losses_are_those_of_the_plain_blocks(turns: list[Trained]) -> None:
    (plain, before), (compiled, graphs), (again, graphs_again), *_ = turns[0]
    assert before == 0 < graphs
    assert graphs_again == graphs, "a later engine of the same kind is compiled again"
    assert compiled == pytest.approx(plain, abs=5e-5)
    assert again == compiled, "the same kernels give other bits"


def test_a_pipelines_stages_use_what_was_compiled_for_the_whole_model(turns: list[Trained]) -> None:
    for of_rank in turns:
        graphs = of_rank[1][1]
        assert [number for _, number in of_rank[3:6]] == [graphs] * 3, "compiled in a step"
        assert of_rank[6][1] > graphs, "selective recomputation has kernels of its own"
    (plain, _), (compiled, _), (full, _), (selective, _) = turns[1][3:]  # the last stage has the losses
    assert compiled == pytest.approx(plain, abs=5e-5)
    assert full == compiled
    assert selective == compiled


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


def a_language_model_of_transformers(me: Rank, folder: Path, kept: Path) -> Trained:
    """Plain; then warmed up with its first layers as a worker does, and trained with all of them."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(kept)
    from torch._dynamo.utils import counters

    plain = train_config(1, model={"kind": "huggingface", "path": str(folder)})
    found: Trained = []
    for config in (plain, plain.compiling(True)):
        if config.train.compile:
            _, batch = micro_batch(0, 0)
            warm(build_workload(config, VOCAB_SIZE, WARM_LAYERS), config, 1, batch)
            compile_no_more()
            found.append(({}, counters["stats"]["unique_graphs"]))
        group = me.group(len(found), [0])
        group.form()
        engine = build_engine(build_workload(config, VOCAB_SIZE), config, config.layout(1), group)
        found.append((train(engine, config, 0, 1, STEPS), counters["stats"]["unique_graphs"]))
        engine.close()
        group.close()
    return found


def test_a_hugging_face_model_is_compiled_before_its_first_step(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    # the last layer attends to a window, as none of those that a worker warms up with
    kinds = ["full_attention"] * 3 + ["sliding_attention"]
    layers = {"num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 8, "use_sliding_window": True}
    transformers.Qwen2Config(vocab_size=VOCAB_SIZE, attention_dropout=0.1, **sizes, **layers).save_pretrained(tmp_path)
    [[plain, (_, graphs), compiled]] = run_team(1, a_language_model_of_transformers, tmp_path, tmp_path / "kept")
    assert plain[1] == 0 < graphs
    assert compiled[1] == graphs, "compiled in a step"
    assert compiled[0] == pytest.approx(plain[0], abs=2e-4)


def test_only_blocks_that_lie_whole_in_a_rank_are_compiled() -> None:
    config = TrainConfig().compiling(True)
    micro_batch = config.train.micro_batch
    assert is_compiled(config, Layout(2, 2, micro_batch, 1))
    assert is_compiled(config, Layout(1, 1, micro_batch, 1, pp=2))
    assert not is_compiled(config, Layout(2, 3, micro_batch, 1))
    assert not is_compiled(config, Layout(1, 1, micro_batch, 1, pp=2, tp=2))
    assert not is_compiled(config, Layout(1, 1, micro_batch, 1, sp=2))
    assert not is_compiled(config, Layout(2, 1, micro_batch, 1, ep=2))
    assert not is_compiled(config, Layout(2, 1, micro_batch // 2, 2)), "it would be compiled anew, in a step"
    assert not is_compiled(TrainConfig().compiling(False), Layout(2, 1, micro_batch, 1))


def test_a_model_of_ones_own_is_not_compiled() -> None:
    with pytest.raises(ConfigError, match=r"train.compile true is not for model.kind own"):
        TrainConfig.load(None, ["model.kind=own", "model.workload=a.py:B", "train.compile=true"])
