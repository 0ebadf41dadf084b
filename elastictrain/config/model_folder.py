"""What a folder of `transformers` says of a model that this project's transformer can be: a Llama, Mistral or Mixtral.

They are the same function under other names, where the folder asks for nothing that this transformer has not: biases,
other activations, heads of another width. What it asks for is told with the value; then `model.kind: huggingface` is
the way, which trains any model but splits none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KINDS = ("llama", "mistral", "mixtral")
FILLED = (
    "num_layers", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size", "num_experts", "experts_per_token",
    "tie_embeddings", "rope_theta", "rope_scaling", "norm_eps", "vocab_size", "max_positions",
)  # fmt: skip
"""Fields of `model` that such a folder decides."""

_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
}
_ROPE_SCALING = {
    "factor": "factor",
    "low_turns": "low_freq_factor",
    "high_turns": "high_freq_factor",
    "trained_positions": "original_max_position_embeddings",
}


def with_folder(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section `model`, with what its `path` decides; raises ValueError where that can't be had.

    What is given must be what the folder says. A section in which all of it is given, as a run's own record has it, is
    taken as it is: the folder may be gone by then.
    """
    if not model.get("path") or model.get("kind", "transformer") != "transformer" or all(n in model for n in FILLED):
        return model
    path = Path(str(model["path"])).expanduser() / "config.json"
    found = _fields(path)
    for name in FILLED:
        if name in model and model[name] != found[name]:
            raise ValueError(
                f"model.{name} {model[name]} is not what {path} says, {found[name]}: leave it out, since model.path "
                "decides it"
            )
    return {**model, **found}


def _fields(path: Path) -> dict[str, Any]:
    try:
        said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path {path.parent}: can't read its config.json ({error})") from None
    if problem := _problem(said):
        raise ValueError(
            f"{path} describes {problem}, which model.kind transformer is not: set model.kind to huggingface, and "
            "leave parallel.pp, parallel.tp and parallel.sp out, which are not for that kind"
        )
    missing = [theirs for theirs in _FIELDS.values() if theirs not in said]
    if missing:
        raise ValueError(f"{path} has no {missing[0]}")
    experts = said["model_type"] == "mixtral"
    positions = [said.get("max_position_embeddings"), said.get("sliding_window")]
    rope = _rope(said)
    return {name: said[theirs] for name, theirs in _FIELDS.items()} | {
        "num_kv_heads": said.get("num_key_value_heads") or said["num_attention_heads"],
        "num_experts": said.get("num_local_experts", 8) if experts else None,
        "experts_per_token": 2,
        "tie_embeddings": said.get("tie_word_embeddings", False),
        "rope_theta": float(rope.get("rope_theta") or said.get("rope_theta", 10_000.0)),
        "rope_scaling": {ours: rope[theirs] for ours, theirs in _ROPE_SCALING.items()} if _is_scaled(rope) else None,
        "norm_eps": said.get("rms_norm_eps", 1e-6),
        "max_positions": min((n for n in positions if n), default=None),
    }


def _rope(said: Mapping[str, Any]) -> Mapping[str, Any]:
    return said.get("rope_parameters") or said.get("rope_scaling") or {}


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _is_scaled(rope: Mapping[str, Any]) -> bool:
    return _rope_type(rope) == "llama3"


def _problem(said: Mapping[str, Any]) -> str | None:
    """What this transformer has not; None where it has all."""
    if said.get("model_type") not in KINDS:
        return f"a {said.get('model_type')!r} and none of {', '.join(KINDS)}"
    for name in ("attention_bias", "mlp_bias"):
        if said.get(name):
            return f"{name} {said[name]}"
    if said.get("hidden_act", "silu") != "silu":
        return f"hidden_act {said['hidden_act']}"
    width = said.get("hidden_size", 0) / (said.get("num_attention_heads") or 1)
    if said.get("head_dim") not in (None, width):
        return f"head_dim {said['head_dim']}, not hidden_size / num_attention_heads = {width:g}"
    if _rope_type(_rope(said)) not in ("default", "llama3"):
        return f"rope_type {_rope_type(_rope(said))}"
    if said["model_type"] == "mixtral" and said.get("num_experts_per_tok", 2) != 2:
        return f"num_experts_per_tok {said['num_experts_per_tok']}"
    return None
