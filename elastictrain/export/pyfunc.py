"""A registered model of language as MLflow loads it: `mlflow.pyfunc.load_model("models:/RUN@best").predict(texts)`.

MLflow keeps the run's config and the checkpoint's hash; the weights are read from the checkpoint itself, and verified.
Nothing is unpickled: this module is the code, of the elastictrain that is installed. `model_config={"storage": FOLDER}`
names the place of runs that were moved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from elastictrain.checkpoint.of_run import checkpoints_of
from elastictrain.config import TrainConfig
from elastictrain.data.tokenizer import Tokenizer
from elastictrain.export.tokenizer import tokenizer_of
from elastictrain.runtime.evaluate import load_weights
from elastictrain.storage import Storage
from elastictrain.tracking.mlflow_registry import LOADED_FROM
from elastictrain.workloads import build_workload
from elastictrain.workloads.base import Workload


class TextModel:
    """Scores texts and goes on with them; on the CPU, in fp32."""

    def __init__(self, workload: Workload, module: nn.Module, tokenizer: Tokenizer, seq_len: int) -> None:
        """`seq_len`: tokens that the model looks at, at a time."""
        self._workload, self._module = workload, module
        self._tokenizer, self._seq_len = tokenizer, seq_len

    def predict(self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """A row for each text: what the model writes after it, its nats, tokens, and bits per byte (NaN for none)."""
        asked = {"num_tokens": 0, "seed": 0, **(params or {})}
        rows = [self._row(text, int(asked["num_tokens"]), int(asked["seed"])) for text in model_input.iloc[:, 0]]
        return pd.DataFrame(rows, columns=["continuation", "nats", "num_tokens", "bits_per_byte"])

    def _row(self, text: str, num_tokens: int, seed: int) -> tuple[str, float, int, float]:
        ids = [self._tokenizer.end_of_text_id, *self._tokenizer.encode(text)]
        nats, count = 0.0, 0
        for first in range(0, len(ids) - 1, self._seq_len):
            window = torch.tensor([ids[first : first + self._seq_len + 1]])
            more_nats, more = self._workload.evaluate(self._module, {"tokens": window})
            nats, count = nats + more_nats, count + more
        prompt = ids[1:] or ids
        written = self._workload.generate(self._module, prompt, num_tokens, seed) if num_tokens else []
        num_bytes = len(text.encode())
        bits = nats / math.log(2) / num_bytes if num_bytes else math.nan
        return self._tokenizer.decode(written), nats, count, bits


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> TextModel:
    """MLflow calls it with the folder of the model's artifacts.

    Raises CheckpointError and DataError when the checkpoint or the tokenizer is gone, or is not what was registered.
    """
    told = json.loads(Path(path, LOADED_FROM).read_text(encoding="utf-8"))
    if model_config and "storage" in model_config:
        told["config"]["run"]["storage"] = model_config["storage"]
    config = TrainConfig.from_dict(told["config"], f"{path}/{LOADED_FROM}")
    storage = Storage.open(config.run.storage)
    store = checkpoints_of(config)
    stored = store.verify(told["step"], told["sha256"])
    tokenizer = tokenizer_of(config.run.name, told["data"]["uri"], told["data"]["sha256"], storage.local)
    workload = build_workload(config, tokenizer.vocab_size)
    module = workload.build(config.train.seed)
    load_weights(module, store.open(stored.step))
    return TextModel(workload, module.eval(), tokenizer, config.data.seq_len)
