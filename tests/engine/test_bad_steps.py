"""A step that must not count leaves the state bit for bit as it was, at every stage, whichever rank saw it first.

About 30 s.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Rank, run_team
from training import FolderSource, ignore, micro_batch, save_shard, train_config, workload

from elastictrain.engine.build import build_engine
from elastictrain.engine.zero import ZeroEngine
from elastictrain.runtime.spoiled import SpoiledWorkload

KINDS = [(stage, dtype) for stage in range(4) for dtype in ("fp32", "bf16")]


class Spoiler:
    """Says when the loss of a micro-batch is to be NaN, on this rank alone; counts the micro-batches."""

    def __init__(self) -> None:
        self.at = -1
        self.count = 0

    def __call__(self) -> bool:
        self.count += 1
        return self.count == self.at


def take(engine: ZeroEngine, replica: int, step: int, **options: Any) -> Any:
    batches = [micro_batch(step, 3 * replica + j) for j in range(3)]
    return engine.train_step(batches, learning_rate=1e-2, before_update=ignore, on_phase=ignore, **options)


def exported(engine: ZeroEngine) -> torch.Tensor:
    buffer = torch.full((engine.shard_index().numel,), torch.nan)
    engine.export_into(buffer)
    return buffer


def bad_steps(me: Rank, folder: Path, stage: int, dtype: str, degrees: dict[str, int], offload: str = "none") -> None:
    """Good steps with bad ones between: the states and losses are those of the good steps alone."""
    config = train_config(stage, dtype, degrees=degrees, offload=offload)
    layout = config.layout(2 * config.parallel.replica_size)
    replica, stories = layout.place(me.index).dp, []
    for generation, disturbed in enumerate((False, True)):
        group = me.group(generation, range(layout.world_size))
        group.form()
        spoiler = Spoiler()
        engine = build_engine(SpoiledWorkload(workload(config), spoiler), config, layout, group)
        told: list[Any] = []
        for step in (1, 2, 3):
            told.append(take(engine, replica, step))
            if step == 1:
                save_shard(engine, folder / f"{generation}", me.index)
                me.meet()
            if not disturbed:
                continue
            before, scalars = exported(engine), dict(engine.scalars())
            # the first micro-batch of rank 1, the last of rank 0, and a loss that is too high for both
            for spoilt, micro in ((1, 1), (0, 3)):
                spoiler.at = spoiler.count + micro if replica == spoilt else -1
                result = take(engine, replica, 10 + step)
                assert (result.updated, result.grad_norm) == (False, math.inf)
                assert [math.isnan(loss) for loss in result.known_losses] == [
                    i == 3 * spoilt + micro - 1 for i in range(6)
                ]
            spoiler.at = -1
            result = take(engine, replica, 10 + step, loss_limit=0.5)
            assert not result.updated
            assert all(math.isfinite(loss) and loss > 0.5 for loss in result.known_losses)
            assert torch.equal(exported(engine), before)
            assert engine.scalars() == scalars == {"optimizer_step": step}
        stories.append([(r.losses, r.known_losses, r.grad_norm, r.updated) for r in told])
        if disturbed:  # an older state in the middle of a life, right after a step that was refused
            take(engine, replica, 20, loss_limit=0.0)
            engine.import_state(FolderSource(folder / "0"))
            assert engine.scalars() == {"optimizer_step": 1}
            again = take(engine, replica, 2)
            assert (again.losses, again.known_losses, again.grad_norm, again.updated) == stories[0][1]
        engine.close()
        group.close()
        me.meet()
    assert stories[0] == stories[1]


@pytest.mark.parametrize(("stage", "dtype"), KINDS)
def test_a_bad_step_changes_nothing(tmp_path: Path, stage: int, dtype: str) -> None:
    run_team(2, bad_steps, tmp_path, stage, dtype, {})


@pytest.mark.parametrize(
    ("stage", "dtype", "degree"),
    [(0, "fp32", "pp"), (1, "fp32", "pp"), (1, "bf16", "pp"), (0, "fp32", "tp"), (3, "bf16", "tp"), (2, "fp32", "sp")],
)
def test_a_bad_step_changes_nothing_in_a_split_model(tmp_path: Path, stage: int, dtype: str, degree: str) -> None:
    """Of a pipeline the last stages alone see the losses."""
    run_team(4, bad_steps, tmp_path, stage, dtype, {degree: 2})


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32")])
def test_a_bad_step_changes_nothing_where_experts_are_shared(tmp_path: Path, stage: int, dtype: str) -> None:
    run_team(2, bad_steps, tmp_path, stage, dtype, {"ep": 2})


@pytest.mark.parametrize(
    ("stage", "dtype", "degrees", "offload"),
    [(1, "bf16", {}, "cpu"), (2, "fp32", {}, "nvme"), (3, "bf16", {}, "cpu"), (1, "bf16", {"pp": 2}, "cpu")],
)
def test_a_bad_step_changes_nothing_off_the_device(
    tmp_path: Path, stage: int, dtype: str, degrees: dict[str, int], offload: str
) -> None:
    run_team(4 if degrees else 2, bad_steps, tmp_path, stage, dtype, degrees, offload)
