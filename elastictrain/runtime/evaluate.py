"""Judging the finished model on what was held out: text in bits per byte beside gzip's, and a sample of its writing."""

from __future__ import annotations

import torch
from torch import nn

from elastictrain.config import TrainConfig
from elastictrain.data.heldout import held_out
from elastictrain.data.manifest import Manifest
from elastictrain.data.samples import Samples, TensorSamples, named_samples
from elastictrain.runtime.protocol import Evaluation
from elastictrain.state.source import StateSource
from elastictrain.state.tensors import Fragment
from elastictrain.workloads.base import Workload


def evaluate(
    workload: Workload, config: TrainConfig, manifest: Manifest | None, source: StateSource, micro_batch: int
) -> Evaluation:
    """Load the weights into a plain module on one process and measure it. Costs one forward over the held-out samples.

    Without a manifest, which is that of text, on the held-out samples of `data.samples`.
    """
    module = workload.build(config.train.seed)
    load_weights(module, source)
    module.eval()
    if manifest is None:
        samples = named_samples(config, "validation")
        nats, count = _summed(workload, module, samples, min(len(samples), config.data.validation_samples), micro_batch)
        return Evaluation(nats / count)
    text = held_out(manifest, config.data.validation_samples)
    rows = TensorSamples({"tokens": text.rows})
    nats, count = _summed(workload, module, rows, len(rows), micro_batch)
    return Evaluation(
        loss=nats / count,
        bits_per_byte=text.bits_per_byte(nats),
        gzip_bits_per_byte=text.gzip_bits_per_byte,
        num_bytes=text.num_bytes,
        sample=_sample(workload, config, manifest, module),
    )


def _summed(
    workload: Workload, module: nn.Module, samples: Samples, num_samples: int, micro_batch: int
) -> tuple[float, int]:
    nats, count = 0.0, 0
    for first in range(0, num_samples, micro_batch):
        batch = samples.read(range(first, min(first + micro_batch, num_samples)))
        batch_nats, batch_count = workload.evaluate(module, batch)
        nats, count = nats + batch_nats, count + batch_count
    return nats, count


def load_weights(module: nn.Module, source: StateSource) -> None:
    """Fill the whole model's parameters, by their names."""
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
