"""Elastic, fault-tolerant training on Ray and DeepSpeed."""

from typing import TYPE_CHECKING, Any

from elastictrain.config import TrainConfig
from elastictrain.version import __version__

if TYPE_CHECKING:
    from elastictrain.trainer import ElasticTrainer, Result

__all__ = ["ElasticTrainer", "Result", "TrainConfig", "__version__"]


def __getattr__(name: str) -> Any:
    # The trainer brings torch, ray and pyarrow; a config needs none of them.
    if name in ("ElasticTrainer", "Result"):
        from elastictrain import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'elastictrain' has no attribute {name!r}")
