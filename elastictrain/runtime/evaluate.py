"""Judging the finished model: bits per byte on held-out text beside gzip's, and a sample of its writing."""

from __future__ import annotations

import torch
from torch import nn

from elastictrain.config import TrainConfig
from elastictrain.data.heldout import held_out
from elastictrain.data.manifest import Manifest
from elastictrain.runtime.protocol import Evaluation
from elastictrain.state.source import StateSource
from elastictrain.state.tensors import Fragment
from elastictrain.workloads.base import Workload


def evaluate(
    workload: Workload, config: TrainConfig, manifest: Manifest, source: StateSource, micro_batch: int
) -> Evaluation:
    """Load the weights into a plain module on one process and measure it. Costs one forward over the held-out rows."""
    module = workload.build(config.train.seed)
    _load(module, source)
    module.eval()
    text = held_out(manifest, config.data.validation_samples)
    nats, count = 0.0, 0
    for first in range(0, len(text.rows), micro_batch):
        batch_nats, batch_count = workload.evaluate(module, {"tokens": text.rows[first : first + micro_batch]})
        nats, count = nats + batch_nats, count + batch_count
    return Evaluation(
        loss=nats / count,
        bits_per_byte=text.bits_per_byte(nats),
        gzip_bits_per_byte=text.gzip_bits_per_byte,
        num_bytes=text.num_bytes,
        sample=_sample(workload, config, manifest, module),
    )


def _load(module: nn.Module, source: StateSource) -> None:
    with torch.no_grad():
        source.fill(
            [
                (Fragment(f"param/{name}", 0, p.numel()), p.detach().view(-1).numpy().data)
                for name, p in module.named_parameters()
            ]
        )


def _sample(workload: Workload, config: TrainConfig, manifest: Manifest, module: nn.Module) -> str:
    if not config.train.sample_tokens:
        return ""
    tokenizer = manifest.tokenizer()
    prompt = tokenizer.encode(config.train.sample_prompt) or [tokenizer.end_of_text_id]
    written = workload.generate(module, prompt, config.train.sample_tokens, config.train.seed)
    return tokenizer.decode([*prompt, *written])
