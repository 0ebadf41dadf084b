"""What may be different when a run is submitted again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from elastictrain.config.whole import TrainConfig

FREE_TO_CHANGE = frozenset(
    {"run.storage", "train.steps", "train.micro_batch", "train.activation_checkpointing"}
    | {"train.compile"}
    | {"train.sample_tokens", "train.sample_prompt", "data.validation_samples", "faults"}
    | {"train.on_bad_loss", "train.on_spike", "train.spike_threshold", "train.max_bad_steps"}
    | {f"{s}.*" for s in ("parallel", "elastic", "cluster", "snapshot", "checkpoint", "tracking")}
)
"""What a run may be continued with other values of: nothing that changes the samples, the model or the optimisation."""


def blocking_changes(old: TrainConfig, new: TrainConfig) -> list[tuple[str, Any, Any]]:
    """Fields (dotted, old value, new value) that forbid continuing a run begun with `old` under `new`."""
    before, after = dict(flatten(old.to_dict())), dict(flatten(new.to_dict()))
    changed = []
    for key in before.keys() | after.keys():
        if key in FREE_TO_CHANGE or f"{key.split('.')[0]}.*" in FREE_TO_CHANGE:
            continue
        if before.get(key) != after.get(key):
            changed.append((key, before.get(key), after.get(key)))
    return sorted(changed)


def flatten(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A config as plain data, field by field: ("train.steps", 300)."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
