"""What a worker warms up with: a model as wide as the run's, with few of its layers, whatever the run's needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from elastictrain.config import TrainConfig
from elastictrain.workloads import build_workload

VOCAB = 300


def layers_of(module: nn.Module, prefix: str) -> set[str]:
    return {name.removeprefix(prefix).split(".")[0] for name, _ in module.named_parameters() if name.startswith(prefix)}


@pytest.mark.parametrize(("num_layers", "built"), [(6, 2), (1, 1)])
def test_of_the_projects_own(num_layers: int, built: int) -> None:
    config = TrainConfig.load(None, [f"model.num_layers={num_layers}"])
    whole, small = (build_workload(config, VOCAB, most).build(0) for most in (None, 2))
    assert (len(layers_of(whole, "blocks.")), len(layers_of(small, "blocks."))) == (num_layers, built)
    shapes = {name: p.shape for name, p in whole.named_parameters()}
    assert all(shapes[name] == p.shape for name, p in small.named_parameters())


def test_of_a_folder_whose_weights_are_not_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="an optional package")
    transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4
    ).save_pretrained(tmp_path)
    config = {"model": {"kind": "huggingface", "path": str(tmp_path)}, "data": {"seq_len": 32}}
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    small = build_workload(TrainConfig.from_dict(config), VOCAB, 2).build(0)
    assert len(layers_of(small, "model.layers.")) == 2
