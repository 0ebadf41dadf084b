"""The Protocol between what is trained and how it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

Batch = Mapping[str, Tensor]
"""Named tensors of one micro-batch, samples first. Language models: `tokens`, int64 [micro_batch, seq_len + 1]."""


class Workload(Protocol):
    """A model, its loss and its optimizer groups. The engine owns devices, precision, sharding and the optimizer."""

    def build(self, seed: int) -> nn.Module:
        """A new fp32 module on the CPU, initialised from `seed` alone: the same bits on every rank and layout."""
        ...

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Mean loss over the micro-batch's predictions, a scalar. `module` may be wrapped by an engine."""
        ...

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay applies: matrices yes, norms and biases no."""
        ...

    def num_tokens(self, batch: Batch) -> int:
        """Predictions in the micro-batch, for throughput."""
        ...

    def evaluate(self, module: nn.Module, batch: Batch) -> tuple[float, int]:
        """Summed negative log-likelihood in nats and the number of predictions, without gradients."""
        ...

    def generate(self, module: nn.Module, prompt: list[int], num_tokens: int, seed: int) -> list[int]:
        """Token ids that continue the prompt, sampled; the same for the same seed."""
        ...
