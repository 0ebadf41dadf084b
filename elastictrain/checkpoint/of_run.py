"""The checkpoints of the run that a config describes, signed and checked where the config names a key.

Whoever reads or completes a checkpoint opens them here: the driver, and each rank that loads one.
"""

from __future__ import annotations

from pathlib import Path

from elastictrain.checkpoint.signature import Signer
from elastictrain.checkpoint.store import CheckpointStore
from elastictrain.config import TrainConfig
from elastictrain.errors import ConfigError
from elastictrain.storage import Storage


def checkpoints_of(config: TrainConfig) -> CheckpointStore:
    """The store; raises ConfigError when there should be a key and it can't be used."""
    storage = Storage.open(config.run.storage)
    return CheckpointStore(storage.run(config.run.name), signer_of(config))


def signer_of(config: TrainConfig) -> Signer | None:
    """The run's signer, None where nothing is signed; raises ConfigError when the key can't be used."""
    path = config.checkpoint.signing_key_file
    if path is None:
        return None
    local = Storage.open(config.run.storage).local
    if local is not None and Path(path).expanduser().resolve().is_relative_to(local.resolve()):
        raise ConfigError(
            f"checkpoint.signing_key_file {path} lies in run.storage {local}: who can change checkpoints could sign "
            f"them. Keep the key where only the run's user can read it."
        )
    return Signer.load(path, config.run.name)
