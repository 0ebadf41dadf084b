"""fp16: the loss scale goes with the state, overflows cost a step and nothing else. About 15 s.

DeepSpeed refuses fp16 on processors that have no arithmetic for it; torch computes it on all, so the ranks here tell
DeepSpeed that theirs have it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Rank, run_team
from training import FolderSource, ignore, micro_batch, plain_losses, save_shard, train, train_config, workload

from elastictrain.config import TrainConfig
from elastictrain.engine.build import build_engine
from elastictrain.engine.zero import ZeroEngine
from elastictrain.errors import ConfigError
from elastictrain.runtime.fleet import demand_of


@dataclass
class Rescaled:
    """A stored state with another loss scale."""

    source: FolderSource
    loss_scale: float
    scalars: dict[str, int | float] = field(init=False)

    def __post_init__(self) -> None:
        told = {"loss_scale": self.loss_scale, "loss_scale_steps": 700, "loss_scale_hysteresis": 1}
        self.scalars = {**self.source.scalars, **told}

    def fill(self, targets: Any) -> None:
        self.source.fill(targets)


def scaled(me: Rank, folder: Path, stage: int) -> list[dict[tuple[int, int], float]]:
    """Steps 1 to 5; steps 4 and 5 again from the state after 3, in another engine; and overflows."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    config = train_config(stage, "fp16")
    found = []
    for generation in range(2):
        group = me.group(generation, (0, 1))
        group.form()
        engine = build_engine(workload(config), config, config.layout(2), group, loads_next=generation > 0)
        if generation:
            stored = FolderSource(folder / "3")
            engine.import_state(stored)
            assert engine.scalars() == stored.scalars
        else:
            found.append(train(engine, config, me.index, 2, range(1, 4)))
            save_shard(engine, folder / "3", me.index)
            me.meet()
        found.append(train(engine, config, me.index, 2, range(4, 6)))
        if generation:
            overflow(me, engine, folder)
        engine.close()
        group.close()
        me.meet()
    return found


def overflow(me: Rank, engine: ZeroEngine, folder: Path) -> None:
    """A scale that no gradient stands: no update, a smaller scale; and a loss that is refused, which leaves it."""
    batches = [micro_batch(6, 3 * me.index + j) for j in range(3)]
    options: dict[str, Any] = {"learning_rate": 1e-2, "before_update": ignore, "on_phase": ignore}
    engine.import_state(Rescaled(FolderSource(folder / "3"), 2.0**40))
    before = exported(engine)
    result = engine.train_step(batches, **options)
    assert (result.updated, result.grad_norm) == (False, math.inf)
    assert all(map(math.isfinite, result.known_losses))
    assert torch.equal(exported(engine), before)
    told = {"loss_scale": 2.0**39, "loss_scale_steps": 1, "loss_scale_hysteresis": 1}
    assert engine.scalars() == {"optimizer_step": 3} | told
    engine.import_state(Rescaled(FolderSource(folder / "3"), 256.0))
    assert not engine.train_step(batches, loss_limit=0.5, **options).updated
    told = {"loss_scale": 256.0, "loss_scale_steps": 700, "loss_scale_hysteresis": 1}
    assert engine.scalars() == {"optimizer_step": 3} | told
    assert engine.train_step(batches, **options).updated
    assert engine.scalars() == {"optimizer_step": 4} | told | {"loss_scale_steps": 701}


def exported(engine: ZeroEngine) -> torch.Tensor:
    buffer = torch.full((engine.shard_index().numel,), torch.nan)
    engine.export_into(buffer)
    return buffer


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_scale_is_part_of_the_state(tmp_path: Path, stage: int) -> None:
    ranks = run_team(2, scaled, tmp_path, stage)
    first, after, again = (one | other for one, other in zip(*ranks, strict=True))
    assert after == again
    expected = plain_losses(train_config(stage), range(1, 6))
    for (step, index), loss in (first | after).items():
        if index >= 0:
            assert loss == pytest.approx(expected[step, index], abs=3e-2), f"step {step}, micro-batch {index}"


def test_without_gpus_it_is_refused_before_anything_starts() -> None:
    config = train_config(1, "fp16")
    with pytest.raises(ConfigError, match=r"train\.dtype fp16 needs GPUs"):
        demand_of(config, [{"CPU": 8.0}])
    assert demand_of(config, [{"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}]) == {"CPU": 1.0, "GPU": 1.0}
    with pytest.raises(ConfigError, match=r"train\.dtype fp16 is written for parallel\.zero_stage 1, 2 and 3"):
        TrainConfig.from_dict({"train": {"dtype": "fp16"}, "parallel": {"zero_stage": 0}})
