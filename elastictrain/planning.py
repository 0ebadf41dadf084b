"""What the planner is asked about a run: its config in the planner's terms, without loading a model or any data."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from elastictrain.config import TrainConfig
from elastictrain.errors import ConfigError
from elastictrain.plan.auto import Asked, Plans, as_asked, planned
from elastictrain.plan.choose import Job
from elastictrain.plan.cluster import Dtype
from elastictrain.plan.figures import Figures
from elastictrain.plan.model_shape import ModelShape
from elastictrain.plan.rules import SPLIT_KIND
from elastictrain.plan.space import Candidate

STREAMED = ("fp32", "bf16")
"""Values of train.dtype with which models stream their loss."""
LLAMA_LIKE = ("llama", "mistral")
"""Model types of `transformers` that are built as this project's transformer is: what the planner can count."""


def job_of(config: TrainConfig) -> Job:
    """The job that a config describes; the tokenizer may turn out smaller than data.vocab_size."""
    if config.model.kind == "own":
        raise ConfigError(
            f"model.kind own: the planner can't count the layers of {config.model.workload}; it knows model.kind "
            "transformer, and huggingface where that is built as a Llama"
        )
    shape = _shape_of_folder(config) if config.model.kind == "huggingface" else _shape_of_transformer(config)
    # as large as bf16, and as fast on what runs it
    dtype: Dtype = "fp32" if config.train.dtype == "fp32" else "bf16"
    splits = config.model.kind == SPLIT_KIND
    fp16 = config.train.dtype == "fp16"
    return Job(shape, dtype, config.train.global_batch, splits, config.parallel.gradient_dtype, fp16)


def asked_of(config: TrainConfig) -> Asked:
    """What the config fixes of the layout."""
    train, parallel = config.train, config.parallel
    return Asked(
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        zero_stage=parallel.zero_stage,
        pp=parallel.pp,
        tp=parallel.tp,
        sp=parallel.sp,
        ep=parallel.ep,
        offload=parallel.offload,
        drive=parallel.offload_path is not None,
        gradient_dtype=parallel.gradient_dtype,
        recompute=train.activation_checkpointing,
    )


def plans_of(config: TrainConfig, figures: Figures, vocab_size: int, low: int | None = None) -> Plans:
    """What the run trains with, from `low` (elastic.min_workers) workers on; raises NothingFits where no layout can."""
    asked, high = asked_of(config), config.elastic.max_workers
    low = low or config.elastic.min_workers
    if config.parallel.layout == "manual":
        return as_asked(asked, low, high, "parallel.layout is manual")
    try:
        job = job_of(config)
    except ConfigError as error:
        return as_asked(asked, low, high, f"nothing else can be weighed: {error}")
    if job.splits:  # the tokenizer decides the size of this project's own
        job = replace(job, shape=replace(job.shape, vocab_size=config.model.vocab_size or vocab_size))
    return planned(job, figures, asked, low, high)


def candidate_of(config: TrainConfig, world_size: int) -> Candidate:
    """The layout that the config asks for at this world size; raises ConfigError when there is none."""
    return Candidate.of(config.layout(world_size))


def overrides_of(candidate: Candidate) -> list[str]:
    """What to write on the command line to train so."""
    degrees = [(name, getattr(candidate, name)) for name in ("pp", "tp", "sp", "ep")]
    split = [f"parallel.{name}={degree}" for name, degree in degrees if degree > 1]
    return [
        "parallel.layout=manual",
        *split,
        f"train.micro_batch={candidate.micro_batch}",
        f"parallel.zero_stage={candidate.zero_stage}",
        *([f"parallel.offload={candidate.offload}"] if candidate.offload != "none" else []),
        *(["parallel.offload_path=/FOLDER/ON/A/DRIVE"] if candidate.offload == "nvme" else []),
        f"train.activation_checkpointing={candidate.activation_checkpointing}",
        f"elastic.max_workers={candidate.world_size}",
    ]


def _shape_of_transformer(config: TrainConfig) -> ModelShape:
    model = config.model
    return ModelShape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads or model.num_heads,
        # as workloads.transformer.SwiGLU has it
        intermediate_size=model.intermediate_size or math.ceil(model.hidden_size * 8 / 3 / 32) * 32,
        vocab_size=model.vocab_size or config.data.vocab_size,
        seq_len=config.data.seq_len,
        tie_embeddings=model.tie_embeddings,
        dropout=model.dropout > 0,
        num_experts=model.num_experts or 1,
        experts_per_token=model.experts_per_token if model.num_experts else 1,
        capacity_factor=model.capacity_factor,
        streams_loss=config.train.dtype in STREAMED,
    )


def _shape_of_folder(config: TrainConfig) -> ModelShape:
    path = Path(str(config.model.path)) / "config.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read {path}: {error}") from None
    if found.get("model_type") not in LLAMA_LIKE or found.get("attention_bias") or found.get("mlp_bias"):
        raise ConfigError(
            f"{path} describes a {found.get('model_type')!r}, whose layers the planner can't count: it knows "
            f"{' and '.join(LLAMA_LIKE)} without biases, and model.kind transformer"
        )
    try:
        return ModelShape(
            num_layers=found["num_hidden_layers"],
            hidden_size=found["hidden_size"],
            num_heads=found["num_attention_heads"],
            num_kv_heads=found.get("num_key_value_heads") or found["num_attention_heads"],
            intermediate_size=found["intermediate_size"],
            vocab_size=found["vocab_size"],
            seq_len=config.data.seq_len,
            head_dim=found.get("head_dim"),
            tie_embeddings=found.get("tie_word_embeddings", False),
            streams_loss=config.train.dtype in STREAMED,
        )
    except KeyError as error:
        raise ConfigError(f"{path} has no {error.args[0]}") from None
