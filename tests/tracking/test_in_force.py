"""Which micro-batch a run goes on with."""

from __future__ import annotations

from elastictrain.config import TrainConfig
from elastictrain.events import Event, GenerationStarted, RunStarted
from elastictrain.tracking.in_force import micro_batch_in_force


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


def test_a_new_run_takes_the_configured_one() -> None:
    assert micro_batch_in_force([], config()) == 4
    assert micro_batch_in_force(attempt(config()), config()) == 4


def test_what_memory_allowed_last_is_kept_over_attempts() -> None:
    earlier = attempt(config(), 4, 2)
    assert micro_batch_in_force(earlier, config()) == 2
    assert micro_batch_in_force([*earlier, *attempt(config(), 2, 1), *attempt(config())], config()) == 1


def test_who_changes_what_needs_memory_is_taken_at_his_word() -> None:
    earlier = attempt(config(), 4, 2)
    assert micro_batch_in_force(earlier, config("train.steps=500")) == 2
    for change in ("train.micro_batch=8", "train.activation_checkpointing=true", "parallel.zero_stage=3"):
        changed = config(change)
        assert micro_batch_in_force(earlier, changed) == changed.train.micro_batch


def test_a_smaller_configured_one_counts() -> None:
    assert micro_batch_in_force(attempt(config(), 4, 2), config("train.micro_batch=1")) == 1
