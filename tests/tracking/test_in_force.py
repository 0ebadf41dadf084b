"""Which layout a run goes on with."""

from __future__ import annotations

import pytest

from elastictrain.config import TrainConfig
from elastictrain.events import Event, GenerationStarted, RunStarted
from elastictrain.plan.layout import Layout
from elastictrain.tracking.in_force import layout_in_force


def config(*overrides: str) -> TrainConfig:
    return TrainConfig.load(None, ["train.micro_batch=4", *overrides])


def attempt(under: TrainConfig, *micro_batches: int) -> list[Event]:
    """An attempt whose generations had these micro-batches."""
    layouts = [{"dp": 2, "zero_stage": 1, "micro_batch": m, "accumulation": 8 // m} for m in micro_batches]
    started = RunStarted(0.0, "demo", 1, under.to_dict(), {})
    return [
        started,
        *(GenerationStarted(1.0, i, layout, 2, 1, "", "fresh", "bit_exact", ()) for i, layout in enumerate(layouts)),
    ]


def test_a_new_run_has_none() -> None:
    assert layout_in_force([], config()) is None
    assert layout_in_force(attempt(config()), config()) is None


def test_what_memory_allowed_last_is_kept_over_attempts() -> None:
    earlier = attempt(config(), 4, 2)
    assert layout_in_force(earlier, config()) == Layout(2, 1, 2, 4)
    assert layout_in_force([*earlier, *attempt(config(), 2, 1), *attempt(config())], config()) == Layout(2, 1, 1, 8)


@pytest.mark.parametrize(
    "change",
    [
        "train.micro_batch=8", "train.activation_checkpointing=true", "parallel.zero_stage=3", "parallel.pp=2",
        "parallel.sp=2", "parallel.offload=cpu",
        "parallel.layout=manual", "cluster.device_memory=8GiB",
    ],
)  # fmt: skip
def test_who_changes_what_needs_memory_is_taken_at_his_word(change: str) -> None:
    earlier = attempt(config(), 4, 2)
    assert layout_in_force(earlier, config("train.steps=500")) == Layout(2, 1, 2, 4)
    assert layout_in_force(earlier, config(change)) is None


def test_degrees_that_were_told_when_they_could_not_be_left_open_count_as_that() -> None:
    before = config("parallel.ep=1", "parallel.sp=1", "parallel.offload=none")
    assert layout_in_force(attempt(before, 4, 2), config()) == Layout(2, 1, 2, 4)


@pytest.mark.parametrize(("told", "means"), [(True, "full"), (False, "none")])
def test_older_runs_tell_recomputation_as_true_or_false(told: bool, means: str) -> None:
    """And so do their configs: who asks for the same in words changes nothing."""
    now = config(f"train.activation_checkpointing={means}")
    layout = {"dp": 2, "zero_stage": 1, "micro_batch": 2, "accumulation": 4, "recompute": told}
    before = now.to_dict()
    before["train"]["activation_checkpointing"] = told
    earlier = [
        RunStarted(0.0, "demo", 1, before, {}),
        GenerationStarted(1.0, 0, layout, 2, 1, "", "fresh", "bit_exact", ()),
    ]
    assert layout_in_force(earlier, now) == Layout(2, 1, 2, 4, recompute=means)
    assert Layout.from_json(Layout(2, 1, 2, 4, recompute=means).to_json()).recompute == means
