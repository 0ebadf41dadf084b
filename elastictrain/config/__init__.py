"""The one description of a run: frozen pydantic models, loaded from YAML and dotted overrides.

`TrainConfig.load(path, ["train.steps=50"])` composes left to right and validates everything that can be known before
a process starts. Unknown keys are refused with the nearest known one. Every field is documented here and in the JSON
schema (`elastictrain schema`). No torch, ray or deepspeed: loading a config costs milliseconds.
"""

from elastictrain.config.changes import FREE_TO_CHANGE, blocking_changes, flatten
from elastictrain.config.fault import Fault, FaultKind, FaultPhase, FaultTarget
from elastictrain.config.learning import BadStepAction, DataSection, ModelSection, RopeScaling, TrainSection
from elastictrain.config.running import (
    BudgetSection,
    CheckpointSection,
    ClusterSection,
    ElasticSection,
    ParallelSection,
    RunSection,
    SnapshotSection,
    TrackingSection,
)
from elastictrain.config.whole import TrainConfig

__all__ = [
    "FREE_TO_CHANGE",
    "BadStepAction",
    "BudgetSection",
    "CheckpointSection",
    "ClusterSection",
    "DataSection",
    "ElasticSection",
    "Fault",
    "FaultKind",
    "FaultPhase",
    "FaultTarget",
    "ModelSection",
    "ParallelSection",
    "RopeScaling",
    "RunSection",
    "SnapshotSection",
    "TrackingSection",
    "TrainConfig",
    "TrainSection",
    "blocking_changes",
    "flatten",
]
