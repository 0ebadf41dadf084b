"""A Llama or Mixtral that `transformers` has saved is this project's transformer: the same logits, whole or split."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from elastictrain.config import TrainConfig
from elastictrain.errors import ConfigError
from elastictrain.plan.layout import Layout
from elastictrain.plan.part import part_of
from elastictrain.workloads import build_workload
from elastictrain.workloads.language_model import LanguageModel

transformers = pytest.importorskip("transformers")

VOCAB = 301
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
STRETCHED = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def saved(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A model of `transformers`, drawn anew and saved in several files; its norms are no ones."""
    generator = torch.Generator().manual_seed(5)
    config = getattr(transformers, f"{kind}Config")(**SIZES | more)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.1 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    model.save_pretrained(folder, max_shard_size="20KB")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def config_of(folder: Path, **model: Any) -> TrainConfig:
    return TrainConfig.from_dict({"model": {"path": str(folder)} | model, "data": {"seq_len": 48}})


def workload(folder: Path, **model: Any) -> LanguageModel:
    found = build_workload(config_of(folder, **model), 260)
    assert isinstance(found, LanguageModel)
    return found


@pytest.mark.parametrize(
    ("kind", "dtype", "more"),
    [
        ("Llama", torch.float32, {"tie_word_embeddings": True}),
        ("Llama", torch.bfloat16, {"tie_word_embeddings": False, "rope_parameters": STRETCHED}),
        ("Mistral", torch.float32, {"sliding_window": None, "num_key_value_heads": 4}),
        ("Mixtral", torch.float32, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_logits_are_those_of_transformers(
    tmp_path: Path, kind: str, dtype: torch.dtype, more: dict[str, Any]
) -> None:
    theirs = saved(tmp_path, kind, dtype, **more)
    ours = workload(tmp_path)
    module = ours.build(1).eval()
    tokens = torch.randint(0, VOCAB, (3, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = theirs(tokens).logits, ours.logits(module, tokens)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_a_part_has_its_share_of_the_folder(tmp_path: Path) -> None:
    saved(tmp_path, "Mixtral", num_local_experts=4, num_experts_per_tok=2)
    ours = workload(tmp_path)
    whole, seen = dict(ours.build(1).named_parameters()), set()
    layout = Layout(2, 1, 2, 1, pp=2, tp=2, ep=2)
    for rank in range(layout.world_size):
        part = part_of(ours.shape, layout, rank)
        slabs = ours.slabs(part)
        for name, parameter in ours.build_part(1, part).named_parameters():
            seen.add(name)
            expected = whole[name]
            if name in slabs:
                dimension = int(whole[name].shape[0] == parameter.shape[0])
                rows = part.share(whole[name].shape[dimension])
                expected = whole[name].narrow(dimension, rows.start, len(rows))
            assert parameter.equal(expected), f"{name} of rank {rank}"
    assert seen == whole.keys()


def test_the_folder_decides_the_sizes_and_a_record_needs_it_no_more(tmp_path: Path) -> None:
    saved(tmp_path, "Llama", rope_parameters=STRETCHED)
    config = config_of(tmp_path)
    assert (config.model.num_layers, config.model.vocab_size, config.model.max_positions) == (2, VOCAB, 64)
    assert config.model.rope_scaling is not None
    assert config.model.rope_scaling.trained_positions == 16
    shutil.rmtree(tmp_path)
    assert TrainConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match=r"can't read its config\.json"):
        config_of(tmp_path)


def test_without_weights_it_is_drawn_anew(tmp_path: Path) -> None:
    transformers.LlamaConfig(**SIZES).save_pretrained(tmp_path)
    drawn, again, other = (dict(workload(tmp_path).build(seed).named_parameters()) for seed in (1, 1, 2))
    name = "blocks.0.mlp.up.weight"
    assert drawn[name].equal(again[name])
    assert not drawn[name].equal(other[name])
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ConfigError, match=r"only as pickle \(pytorch_model\.bin\)"):
        workload(tmp_path)


@pytest.mark.parametrize(
    ("said", "model", "problem"),
    [
        ({}, {"num_layers": 3}, r"model\.num_layers 3 is not what .*config\.json says, 2: leave it out"),
        ({"attention_bias": True}, {}, "attention_bias True, which model.kind transformer is not"),
        ({"model_type": "gpt2"}, {}, "a 'gpt2' and none of llama, mistral, mixtral"),
        ({"head_dim": 16}, {}, r"head_dim 16, not hidden_size / num_attention_heads = 8"),
        ({"rope_parameters": {"rope_type": "yarn"}}, {}, "rope_type yarn"),
        ({"hidden_act": "gelu"}, {}, "hidden_act gelu"),
        ({"max_position_embeddings": 32}, {}, r"data\.seq_len 48 exceeds model\.max_positions 32"),
    ],
)
def test_what_it_is_not_is_told_before_anything_starts(
    tmp_path: Path, said: dict[str, Any], model: dict[str, Any], problem: str
) -> None:
    transformers.LlamaConfig(**SIZES).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    with pytest.raises(ConfigError, match=problem):
        config_of(tmp_path, **model)


def test_weights_of_another_model_are_told(tmp_path: Path) -> None:
    saved(tmp_path, "Llama")
    file = tmp_path / "config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"no weight model\.layers\.2\.\S+ in its safetensors"):
        workload(tmp_path)
    file.write_text(json.dumps(said | {"intermediate_size": 64}))
    with pytest.raises(ConfigError, match=r"is \(48, 32\) in model-\S+, and \(64, 32\) by config\.json"):
        workload(tmp_path)
    file.write_text(json.dumps(said | {"vocab_size": 200}))
    with pytest.raises(ConfigError, match=r"model\.vocab_size 200 is smaller than the tokenizer's 260"):
        workload(tmp_path)
