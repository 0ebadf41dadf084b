"""Elastic, fault-tolerant training on Ray and DeepSpeed."""

import os
import secrets
import sys
from typing import TYPE_CHECKING, Any

from elastictrain.config import TrainConfig
from elastictrain.version import __version__

if TYPE_CHECKING:
    from elastictrain.trainer import ElasticTrainer, Result

__all__ = ["ElasticTrainer", "Result", "TrainConfig", "__version__"]

# Ray reads once, when it is first imported, how to authenticate. So an embedded cluster gets a token of its own here,
# before that import, unless the environment names a cluster or a way to authenticate already.
if "ray" not in sys.modules and not os.environ.keys() & {"RAY_ADDRESS", "RAY_AUTH_MODE"}:
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
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
