"""Elastic, fault-tolerant training on Ray and DeepSpeed."""

import os
import sys
from typing import TYPE_CHECKING, Any

from elastictrain.authentication import take_own_token
from elastictrain.config import TrainConfig
from elastictrain.version import __version__

if TYPE_CHECKING:
    from elastictrain.trainer import ElasticTrainer, Result

__all__ = ["ElasticTrainer", "Result", "TrainConfig", "__version__"]

if "ray" not in sys.modules:  # else its user has chosen
    take_own_token()
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Workers' lines are passed on without colour codes, and without Ray's own paragraph on every death: the run tells of
# it in one line, with its cause.
os.environ.setdefault("RAY_COLOR_PREFIX", "0")
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed while executing")


def __getattr__(name: str) -> Any:
    # The trainer brings torch, ray and pyarrow; a config needs none of them.
    if name in ("ElasticTrainer", "Result"):
        from elastictrain import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'elastictrain' has no attribute {name!r}")
