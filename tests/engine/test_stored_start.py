"""A Llama that `transformers` has saved, split over four ranks: its first losses are those of `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Rank, run_team
from training import VOCAB_SIZE, micro_batch, train, workload

from elastictrain.config import TrainConfig
from elastictrain.engine.build import build_engine

transformers = pytest.importorskip("transformers")

DEGREES: tuple[dict[str, Any], ...] = ({"pp": 2, "tp": 2}, {"tp": 2, "sp": 2}, {})


def config_of(folder: Path, degrees: dict[str, Any]) -> TrainConfig:
    return TrainConfig.from_dict(
        {
            "train": {"global_batch": 8, "micro_batch": 2, "learning_rate": 1e-3},
            "model": {"path": str(folder)},
            "data": {"seq_len": 16},
            "parallel": {"layout": "manual", "zero_stage": 1, **degrees},
            "elastic": {"max_workers": 4},
        }
    )


def first_losses(me: Rank, folder: Path, degrees: dict[str, Any]) -> dict[tuple[int, int], float]:
    config = config_of(folder, degrees)
    group = me.group(0, range(4))
    group.form()
    engine = build_engine(workload(config), config, config.layout(4), group)
    found = train(engine, config, me.index, 4, [1])
    engine.close()
    group.close()
    return found


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_the_first_losses_are_those_of_transformers(tmp_path: Path, degrees: dict[str, Any]) -> None:
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=VOCAB_SIZE, num_key_value_heads=2, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    losses: dict[tuple[int, int], float] = {}
    for found in run_team(4, first_losses, tmp_path, degrees):
        losses |= found
    for index in range(4):
        _, batch = micro_batch(1, index)
        with torch.no_grad():
            logits = model(batch["tokens"][:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten())
        assert losses[1, index] == pytest.approx(float(expected), abs=5e-6)
