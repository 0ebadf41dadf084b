"""What earlier attempts of a run settled, beside its config (pure): the micro-batch that memory allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elastictrain.config import TrainConfig
from elastictrain.events import Event, GenerationStarted, RunStarted


def micro_batch_in_force(earlier: Sequence[Event], config: TrainConfig) -> int:
    """The micro-batch to go on with: that of the newest generation where memory had run out, else train.micro_batch.

    What memory a forward pass needs is the user's to change: under another train.micro_batch, activation checkpointing,
    ZeRO stage or split of the model than that generation's, train.micro_batch counts as it is.
    """
    configured, begun, newest = config.train.micro_batch, None, None
    for event in earlier:
        if isinstance(event, RunStarted):
            begun = event
        elif isinstance(event, GenerationStarted):
            newest = (begun, event.layout)
    if newest is None or newest[0] is None:
        return configured
    before, layout = newest[0].config, newest[1]
    if _needs(before) != _needs(config.to_dict()):
        return configured
    return min(configured, int(layout["micro_batch"]))


def _needs(config: Mapping[str, Mapping[str, Any]]) -> tuple[Any, ...]:
    """What decides about memory, of a config as it was told."""
    train, parallel = config.get("train", {}), config.get("parallel", {})
    usual = {"pp": 1, "tp": 1, "sp": 1, "offload": "none"}  # not told by older runs
    split = tuple(parallel.get(name, value) for name, value in usual.items())
    return train.get("micro_batch"), train.get("activation_checkpointing"), parallel.get("zero_stage"), split
