"""A run that begins with a checkpoint of another run (run.start_from): a copy of it becomes the new run's first.

From there on it is a resume like any other, under any layout; the other run may go on, or remove its own. The step, the
place in the data and the optimizer's state come along, so what the two runs have in common is the same.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

from elastictrain.checkpoint.of_run import checkpoints_of
from elastictrain.checkpoint.store import CheckpointStore
from elastictrain.config import TrainConfig
from elastictrain.data.order import cursor
from elastictrain.errors import CheckpointError, ConfigError
from elastictrain.events import CheckpointWritten, Event, GenerationStarted
from elastictrain.runtime.durable import as_written


def check_branch(config: TrainConfig) -> None:
    """Raise ConfigError when run.start_from can't be begun from, as far as the config tells."""
    if config.run.start_from is None:
        return
    run, step = _named(config.run.start_from)
    if run == config.run.name:
        raise ConfigError(f"run.start_from {config.run.start_from} is of the run itself: choose another run.name")
    if step >= config.train.steps:
        raise ConfigError(
            f"run.start_from {config.run.start_from} has all of train.steps {config.train.steps} behind it: set "
            f"train.steps to more than {step}"
        )


def branch(
    config: TrainConfig, store: CheckpointStore, earlier: Sequence[Event], emit: Callable[[Event], None]
) -> None:
    """Make the checkpoint the run's own, unless the run has trained, or has it already."""
    if config.run.start_from is None or any(isinstance(e, CheckpointWritten | GenerationStarted) for e in earlier):
        return
    run, step = _named(config.run.start_from)
    other = checkpoints_of(config.model_copy(update={"run": config.run.model_copy(update={"name": run})}))
    begun = time.time()
    try:
        found = next((c for c in other.list() if c.step == step), None)
        if found is None:
            there = ", ".join(f"{run}@{c.step}" for c in other.list()) or "none"
            raise ConfigError(
                f"run.start_from {config.run.start_from}: there is no such checkpoint in {config.run.storage}; run "
                f"{run} has {there}"
            )
        _check_samples(config, found.manifest.samples, step)
        stored = store.adopt(other, step, config.run.name)
    except CheckpointError as error:
        raise CheckpointError(f"run.start_from {config.run.start_from}: {error}") from error
    emit(as_written(stored, time.time(), seconds=time.time() - begun, origin=found.uri))


def _check_samples(config: TrainConfig, samples: int, step: int) -> None:
    if samples != cursor(step, config.train.global_batch):
        raise ConfigError(
            f"run.start_from {config.run.start_from} has used {samples} samples in {step} steps, which is not "
            f"train.global_batch {config.train.global_batch}: give it the same"
        )


def _named(start_from: str) -> tuple[str, int]:
    match = re.fullmatch(r"(.+)@(\d+)", start_from)
    assert match is not None
    return match[1], int(match[2])
