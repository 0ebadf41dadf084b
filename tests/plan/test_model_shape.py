"""What the planner counts, against the real modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elastictrain.config import TrainConfig
from elastictrain.errors import ConfigError
from elastictrain.plan.activations import layer_bytes
from elastictrain.planning import job_of
from elastictrain.workloads.transformer import Transformer, rotary_table

MODELS = [
    {"num_layers": 1, "hidden_size": 64, "num_heads": 4},
    {"num_layers": 3, "hidden_size": 96, "num_heads": 6, "num_kv_heads": 2, "tie_embeddings": False},
    {"num_layers": 2, "hidden_size": 80, "num_heads": 4, "num_kv_heads": 1, "intermediate_size": 100, "dropout": 0.1},
    {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_experts": 4, "intermediate_size": 96},
    {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_experts": 6, "experts_per_token": 1, "dropout": 0.1},
]


def config_of(model: dict[str, object], **train: object) -> TrainConfig:
    data = {"seq_len": 24, "vocab_size": 301}
    return TrainConfig.from_dict({"model": model, "data": data, "train": train})


@pytest.mark.parametrize("model", MODELS)
def test_parameters_are_those_of_the_module(model: dict[str, object]) -> None:
    config = config_of(model)
    shape = job_of(config).shape
    module = Transformer(config.model, config.data.vocab_size)
    assert shape.num_parameters == sum(p.numel() for p in module.parameters())
    assert sum(shape.by_part().values()) == shape.num_parameters
    assert shape.attention_parameters == sum(p.numel() for p in module.blocks["0"].attention.parameters())


@pytest.mark.parametrize("model", MODELS)
def test_flops_are_those_that_torch_counts(model: dict[str, object]) -> None:
    config = config_of(model)
    shape = job_of(config).shape
    module = Transformer(config.model, config.data.vocab_size)
    tokens = torch.zeros(2, shape.seq_len, dtype=torch.long)
    # torch counts plain matrix products; its fused attention on the CPU it does not know
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(tokens)
    computed = shape.num_layers * shape.layer_flops_per_token(empty_room=True) + shape.head_flops_per_token
    assert counter.get_total_flops() == pytest.approx(computed * tokens.numel())
    forward = shape.num_layers * shape.layer_flops_per_token() + shape.head_flops_per_token
    assert shape.flops_per_token() == 3 * forward
    assert (forward < computed) == (shape.num_experts > 1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_a_layer_keeps_what_autograd_keeps(model: dict[str, object], dtype: str) -> None:
    config = config_of(model)
    shape = job_of(config).shape
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    block = Transformer(config.model, config.data.vocab_size).blocks["0"].to(torch_dtype)
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    hidden = torch.randn(4, shape.seq_len, shape.hidden_size, dtype=torch_dtype, requires_grad=True)
    rotation = rotary_table(shape.seq_len, block.attention.head_dim, 1e4, hidden.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(hidden, rotation)
    tokens = 4 * shape.seq_len
    measured = sum(storage.nbytes() for storage in kept.values())
    assert layer_bytes(shape, dtype, tokens) == pytest.approx(measured, rel=0.02)


def test_a_llama_folder_is_counted_without_loading_it(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=400, tie_word_embeddings=False,
    )  # fmt: skip
    llama.save_pretrained(tmp_path)
    shape = job_of(config_of({"kind": "huggingface", "path": str(tmp_path)})).shape
    assert shape.num_parameters == sum(p.numel() for p in LlamaForCausalLM(llama).parameters())


def test_a_model_that_the_planner_can_not_count_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 64}))
    with pytest.raises(ConfigError, match=r"config\.json describes a 'gpt2'.*llama and mistral"):
        job_of(config_of({"kind": "huggingface", "path": str(tmp_path)}))
