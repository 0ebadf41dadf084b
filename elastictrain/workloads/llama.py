"""This project's transformer and a Llama of `transformers` (pure): the same function, under other names.

Both have RMSNorm, rotary embeddings on the pairs (i, i + head_dim / 2), grouped key and value heads and SwiGLU, without
a bias anywhere. Dropout is left out: it does nothing outside training.

With experts it is a Mixtral, which is a Llama but for these, and drops no token either. A Mixtral scales what the
chosen experts weigh to add up to 1, so it can't be a model whose tokens go to one expert each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastictrain.config import ModelSection

_OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
}
_MLP = {
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
_EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}


def llama_names(model: ModelSection) -> dict[str, str]:
    """Llama's name of each parameter that the whole model has, by this project's name."""
    outside = {
        ours: theirs for ours, theirs in _OUTSIDE.items() if not (ours == "head.weight" and model.tie_embeddings)
    }
    return outside | {
        f"blocks.{number}.{ours}": f"model.layers.{number}.{theirs}"
        for number in range(model.num_layers)
        for ours, theirs in (_IN_BLOCK | (_experts(model.num_experts) if model.num_experts else _MLP)).items()
    }


def _experts(num_experts: int) -> dict[str, str]:
    return {"mlp.router.weight": "block_sparse_moe.gate.weight"} | {
        f"mlp.experts.{number}.{ours}.weight": f"block_sparse_moe.experts.{number}.{theirs}.weight"
        for number in range(num_experts)
        for ours, theirs in _EXPERT.items()
    }


def _scaling(model: ModelSection) -> dict[str, Any] | None:
    scaling = model.rope_scaling
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_turns,
        "high_freq_factor": scaling.high_turns,
        "original_max_position_embeddings": scaling.trained_positions,
    }


def llama_config(
    model: ModelSection, shapes: Mapping[str, tuple[int, ...]], seq_len: int, end_of_text_id: int
) -> dict[str, Any]:
    """The config.json that goes with weights of these shapes (by this project's names)."""
    mlp = "mlp" if model.num_experts is None else "mlp.experts.0"
    experts = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.experts_per_token,
        "router_aux_loss_coef": model.load_balance,
        "sliding_window": None,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shapes["embedding.weight"][0],
        "hidden_size": model.hidden_size,
        "intermediate_size": shapes[f"blocks.0.{mlp}.gate.weight"][0],
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads or model.num_heads,
        "head_dim": model.hidden_size // model.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions or seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_theta": model.rope_theta} | (_scaling(model) or {"rope_type": "default"}),
        "rope_scaling": _scaling(model),
        "rope_theta": model.rope_theta,  # where releases of transformers before 5 look for it
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "bos_token_id": end_of_text_id,  # it stands before each text, so it begins one as well
        "eos_token_id": end_of_text_id,
        "pad_token_id": None,
        "dtype": "float32",
    } | (experts if model.num_experts else {})
