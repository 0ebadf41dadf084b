"""What a config names beside itself, looked at before anything starts; costs no import of Ray, torch or pyarrow."""

from __future__ import annotations

from elastictrain.config import TrainConfig
from elastictrain.data.corpus import find_documents
from elastictrain.data.tokenizer import given_tokenizer
from elastictrain.workloads import check_model_folder


def check_inputs(config: TrainConfig) -> None:
    """Raise ConfigError or DataError when corpus, model folder, named code, tokenizer or signing key can't serve."""
    if config.checkpoint.signing_key_file is not None:
        from elastictrain.checkpoint.of_run import signer_of

        signer_of(config)
    if config.data.samples is None:
        find_documents(config.data)
    check_model_folder(config)
    given_tokenizer(config)
