"""Elastic, fault-tolerant training on Ray and DeepSpeed."""

from elastictrain.config import TrainConfig
from elastictrain.version import __version__

__all__ = ["TrainConfig", "__version__"]
