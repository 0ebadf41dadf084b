"""A model for which somebody else computes: what a host does whose GPU has the work, on a machine that has none.

A small residual MLP guesses the next token from the one before it, and each micro-batch sleeps as long as a device
would take for a larger one. So the processors are free for all that is no step, as they are where platforms are used;
`jobs/llm_tiny.yaml`, which recovery.py takes otherwise, has a step on every core.
"""

from __future__ import annotations

import time

from torch import Tensor, nn
from torch.nn import functional as F

from elastictrain.workloads.base import Batch
from elastictrain.workloads.own import OwnWorkload

DEVICE_S = 0.1
"""A micro-batch on the device that there is none of."""


class Block(nn.Module):
    """Norm, up, down, and what came in: [..., hidden] to the same."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(hidden),
            nn.Linear(hidden, 4 * hidden),
            nn.Linear(4 * hidden, hidden),
        )

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        return x + change


class Waiting(OwnWorkload):
    """`model.hidden_size` and `model.num_layers` are its sizes."""

    def create(self) -> nn.Module:
        model, vocab_size = self.config.model, self.config.data.vocab_size
        blocks = [Block(model.hidden_size) for _ in range(model.num_layers)]
        return nn.Sequential(
            nn.Embedding(vocab_size, model.hidden_size),
            *blocks,
            nn.LayerNorm(model.hidden_size),
            nn.Linear(model.hidden_size, vocab_size),
        )

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        time.sleep(DEVICE_S)
        tokens = batch["tokens"]
        logits = module(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
