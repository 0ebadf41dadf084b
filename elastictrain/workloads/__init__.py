"""What is trained: modules, losses and optimizer settings behind one Protocol, without a word of ranks or ZeRO."""

from __future__ import annotations

from elastictrain.config import TrainConfig
from elastictrain.workloads.base import Workload
from elastictrain.workloads.language_model import LanguageModel


def build_workload(config: TrainConfig, vocab_size: int) -> Workload:
    """The workload that `model.kind` asks for; `vocab_size` is the tokenizer's.

    Raises ConfigError when the model can't serve this tokenizer or an optional package is missing.
    """
    if config.model.kind == "huggingface":
        # optional: `transformers` costs seconds to import and need not be installed
        from elastictrain.workloads.huggingface import HuggingFaceModel

        return HuggingFaceModel(config, vocab_size)
    return LanguageModel(config, vocab_size)
