"""Same layout: same bits, also across a rebuild. Other layout: same state, and losses that differ by rounding only.

Up to three processes live through each test's whole story, generation after generation, as survivors of a job do.
About 40 s together.
"""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import pytest
import torch
from ranks import Rank, run_team
from training import (
    FolderSource,
    live_through,
    logical_shapes,
    micro_batch,
    plain_losses,
    save_shard,
    train,
    train_config,
    workload,
)

from elastictrain.engine.build import build_engine

Losses = dict[tuple[int, int], float]


# ------------------------------------------------------------------------------------------------------ same layout


def twice_and_rebuilt(me: Rank, folder: Path, kinds: list[tuple[int, str]]) -> list[Losses]:
    """For each (stage, dtype): steps 1 to 5 twice, then 1 to 3, an export, and 4 to 5 in a new generation from it."""
    found: list[Losses] = []
    for stage, dtype in kinds:
        config = train_config(stage, dtype)
        states = folder / f"{stage}{dtype}"
        for steps, resume in ((range(1, 6), False), (range(1, 6), False), (range(1, 4), False), (range(4, 6), True)):
            group = me.group(len(found), (0, 1))
            group.form()
            engine = build_engine(workload(config), config, config.layout(2), group, loads_next=resume)
            if resume:
                engine.import_state(FolderSource(states))
            found.append(train(engine, config, me.index, 2, steps))
            save_shard(engine, states, me.index)
            engine.close()
            group.close()
            me.meet()
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_rebuilt_engine_goes_on_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    kinds = [(stage, dtype) for stage in range(4)]
    results = run_team(2, twice_and_rebuilt, tmp_path, kinds)
    first_losses = []
    for i, kind in enumerate(kinds):
        first, second, before, after = (results[0][4 * i + j] | results[1][4 * i + j] for j in range(4))
        assert first == second, f"{kind} is not deterministic"
        assert before | after == first, f"{kind} does not go on as it was"
        first_losses.append({key: loss for key, loss in first.items() if key[0] == 1 and key[1] >= 0})
    # Before the first update nothing depends on the layout.
    if dtype == "fp32":
        first_losses.append({key: loss for key, loss in plain_losses(train_config(0), [1]).items() if key[1] >= 0})
    assert all(losses == first_losses[0] for losses in first_losses)


# ----------------------------------------------------------------------------------------------------- other layout

JOURNEY = ((1, 2), (1, 1), (3, 3), (2, 2), (0, 3), (3, 2), (3, 3), (2, 1), (0, 1), (1, 3), (3, 1), (0, 2))
"""(stage, world size) of generations, one step each. The ranks of the second (3, 3) have built different engines."""


def journey(me: Rank, folder: Path, dtype: str) -> Losses:
    """One step in each layout; what a generation imported, it exports again before its step."""
    found: Losses = {}
    for generation, (stage, world_size) in enumerate(JOURNEY):
        # Shrinking and growing at both ends, so that every process leaves and comes back.
        members = range(world_size) if generation % 2 else range(3 - world_size, 3)
        if me.index in members:
            found |= live_through(me, folder, generation, members, train_config(stage, dtype))
        me.meet()
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 5e-6), ("bf16", 3e-2)])
def test_a_state_taken_in_any_layout_loads_in_any_other(tmp_path: Path, dtype: str, tolerance: float) -> None:
    losses: Losses = {}
    for found in run_team(3, journey, tmp_path, dtype):
        losses |= found
    config = train_config(1, dtype)
    for generation in range(1, len(JOURNEY)):
        stored = FolderSource(tmp_path / f"after{generation - 1}").tensors(logical_shapes(config))
        loaded = FolderSource(tmp_path / f"imported{generation}").tensors(logical_shapes(config))
        for name, values in stored.items():
            assert (values == loaded[name]).all(), f"{name} changed between {JOURNEY[generation - 1 : generation + 1]}"
    expected = plain_losses(config, range(1, len(JOURNEY) + 1))
    assert losses.keys() == expected.keys()
    for (step, index), value in losses.items():
        # Norms are sums over every weight, so they round more.
        bound = tolerance if index >= 0 else 20 * tolerance
        assert value == pytest.approx(expected[step, index], abs=bound), f"step {step}, micro-batch {index}"


# ------------------------------------------------------------------------------------------------- beside training


def export_beside_a_forward(me: Rank, stage: int) -> bool:
    """Whether an export in another thread, during the next step, is what it would have been before."""
    config = train_config(stage)
    group = me.group(stage, (0, 1))
    group.form()
    engine = build_engine(workload(config), config, config.layout(2), group)
    train(engine, config, me.index, 2, [1])
    before, beside = (torch.full((engine.shard_index().numel,), torch.nan) for _ in range(2))
    engine.export_into(before)
    exports = Thread(target=lambda: [engine.export_into(beside) for _ in range(20)])

    def start_or_finish(phase: str) -> None:
        if phase == "forward" and exports.ident is None:
            exports.start()

    batches = [micro_batch(2, 3 * me.index + j) for j in range(3)]
    engine.train_step(batches, learning_rate=0.1, before_update=exports.join, on_phase=start_or_finish)
    after = torch.empty_like(before)
    engine.export_into(after)
    engine.close()
    group.close()
    return torch.equal(before, beside) and not torch.equal(before, after)


@pytest.mark.parametrize("stage", range(4))
def test_an_export_may_run_beside_the_next_forward_and_backward(stage: int) -> None:
    assert run_team(2, export_beside_a_forward, stage) == [True, True]
