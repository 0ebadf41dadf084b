"""What earlier attempts of a run settled, beside its config (pure): the layout that memory allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elastictrain.config import TrainConfig
from elastictrain.events import Event, GenerationStarted, RunStarted
from elastictrain.plan.layout import RECOMPUTE_OF, Layout

_NEW = {"pp": None, "tp": None, "zero_stage": None, "layout": "auto"}
"""Of `parallel`, what older runs do not tell."""
_NOTHING = {"ep": 1, "sp": 1, "offload": "none"}
"""What older runs tell of the others where nobody asked for them."""


def layout_in_force(earlier: Sequence[Event], config: TrainConfig) -> Layout | None:
    """The layout of the newest generation; the run goes on with what it has come to by lacks of memory.

    What memory is needed is the user's to change: None where another micro-batch, activation checkpointing or
    `parallel.*` is asked for than for that generation, or other memory; and for a new run.
    """
    begun, newest = None, None
    for event in earlier:
        if isinstance(event, RunStarted):
            begun = event
        elif isinstance(event, GenerationStarted):
            newest = (begun, event.layout)
    if newest is None or newest[0] is None or _needs(newest[0].config) != _needs(config.to_dict()):
        return None
    return Layout.from_json(newest[1])


def _needs(config: Mapping[str, Mapping[str, Any]]) -> tuple[Any, ...]:
    """What decides about memory, of a config as it was told."""
    train, parallel = config.get("train", {}), config.get("parallel", {})
    memory = config.get("cluster", {}).get("device_memory")
    parallel = {name: None if _NOTHING.get(name) == value else value for name, value in parallel.items()}
    parallel = {**_NEW, **dict.fromkeys(_NOTHING), **parallel}
    again = train.get("activation_checkpointing")
    again = RECOMPUTE_OF[again] if isinstance(again, bool) else again
    return train.get("micro_batch"), again, parallel, memory
