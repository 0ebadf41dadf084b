"""What is trained: modules, losses and optimizer settings behind one Protocol, without a word of ranks or ZeRO.

Imported where they are needed: `torch` and `transformers` cost seconds, and the latter need not be installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from elastictrain.config import TrainConfig
from elastictrain.errors import ConfigError
from elastictrain.workloads.named import check_named

if TYPE_CHECKING:
    from collections.abc import Iterable

    from elastictrain.state.source import StateSource
    from elastictrain.state.tensors import LogicalTensor
    from elastictrain.workloads.base import Workload


def check_model_folder(config: TrainConfig) -> None:
    """Raise ConfigError when `model.path` names no model's folder, or what is named of the user's code is not there.

    In microseconds, before anything is imported.
    """
    check_named("model.workload", config.model.workload)
    check_named("data.samples", config.data.samples)
    if config.model.path is not None and config.model.kind != "own":
        folder = Path(config.model.path).expanduser()
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.path {folder} has no config.json; it must be a local Hugging Face folder")


def starting_state(config: TrainConfig, tensors: Iterable[LogicalTensor]) -> StateSource | None:
    """What a run begins with beyond its model's weights: the optimizer of a universal checkpoint that has one.

    Of this model, whose `tensors` are given. Raises ConfigError when what is there can't be gone on with.
    """
    if config.model.kind != "huggingface":
        return None
    from elastictrain.workloads.universal import is_universal, universal_state

    folder = Path(str(config.model.path))
    return universal_state(folder, tensors) if is_universal(folder) else None


def build_workload(config: TrainConfig, vocab_size: int, most_layers: int | None = None) -> Workload:
    """The workload that `model.kind` asks for; `vocab_size` is the tokenizer's.

    With `most_layers` a model as wide, with no more layers and weights drawn anew: one that fits into a single worker,
    however large the whole is. A model of the user's own is always the whole.
    Raises ConfigError when the model can't serve this tokenizer or an optional package is missing.
    """
    if config.model.kind == "own":
        from elastictrain.workloads.own import own_workload

        return own_workload(config)
    if config.model.kind == "huggingface":
        from elastictrain.workloads.huggingface import HuggingFaceModel

        return HuggingFaceModel(config, vocab_size, most_layers)
    from elastictrain.workloads.language_model import LanguageModel

    return LanguageModel(config if most_layers is None else _with_layers(config, most_layers), vocab_size)


def _with_layers(config: TrainConfig, most: int) -> TrainConfig:
    fewer = {"num_layers": min(most, config.model.num_layers), "path": None}
    model = config.model.model_copy(update=fewer)
    return config.model_copy(update={"model": model})
