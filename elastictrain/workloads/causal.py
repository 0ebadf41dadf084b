"""What every causal language model shares: next-token loss, evaluation, sampling.

A model only has to say how it is built and how tokens become logits. All sums over the vocabulary are done in fp32.
`evaluate` and `generate` run the module in evaluation mode and put its mode back. Under ZeRO-3 a forward pass is a
collective, so there all ranks call them together, with equal shapes.

Cost: the loss holds two fp32 copies of the logits, 8 bytes x predictions x vocabulary, where a model has no way without
(`head_loss`). Sampling keeps no key-value cache: one forward pass over the last `data.seq_len` tokens per new token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastictrain.config import TrainConfig
from elastictrain.plan.part import Part
from elastictrain.workloads.base import Batch

TEMPERATURE = 0.8
"""Divides the logits before sampling: below one, likely tokens gain."""
TOP_K = 50
"""Tokens that sampling chooses from."""


class CausalLanguageModel(ABC):
    """A Workload whose module predicts each token from those before it."""

    def __init__(self, config: TrainConfig, vocab_size: int) -> None:
        self.config = config
        self.vocab_size = vocab_size

    @abstractmethod
    def build(self, seed: int) -> nn.Module:
        """A new fp32 module on the CPU, initialised from `seed` alone."""

    @abstractmethod
    def logits(self, module: nn.Module, tokens: Tensor) -> Tensor:
        """Scores of the next token after each position: [batch, seq] to [batch, seq, vocab]."""

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats."""
        return self.cross_entropy(module, batch)

    def cross_entropy(self, module: nn.Module, batch: Batch) -> Tensor:
        """Mean over the predictions, in nats."""
        return next_token_loss(self.logits(module, self.part_input(batch)), batch)

    def positions_of(self, batch: Batch, part: Part) -> Batch:
        """The tokens at its positions, and the one that the last of them predicts."""
        tokens = batch["tokens"]
        mine = part.positions(tokens.shape[1] - 1)
        return {"tokens": tokens[:, mine.start : mine.stop + 1]}

    def part_input(self, batch: Batch) -> Tensor:
        """Every token but the last, which predicts nothing."""
        return batch["tokens"][:, :-1]

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Matrices, embeddings included, decay; norms and biases, which are vectors, don't."""
        return parameter.ndim >= 2

    def take_gauges(self) -> Mapping[str, float]:
        """Nothing, for most models."""
        return {}

    def num_tokens(self, batch: Batch) -> int:
        """Every token but a sample's first is predicted."""
        samples, length = batch["tokens"].shape
        return samples * (length - 1)

    def evaluate(self, module: nn.Module, batch: Batch) -> tuple[float, int]:
        """Summed negative log-likelihood in nats, and the number of predictions."""
        count = self.num_tokens(batch)
        with evaluating(module):
            return self.cross_entropy(module, batch).item() * count, count

    def generate(self, module: nn.Module, prompt: list[int], num_tokens: int, seed: int) -> list[int]:
        """Sample a continuation; the prompt needs at least one token."""
        generator = torch.Generator().manual_seed(seed)
        device = next(module.parameters()).device
        tokens = list(prompt)
        with evaluating(module):
            for _ in range(num_tokens):
                context = torch.tensor([tokens[-self.config.data.seq_len :]], device=device)
                # a larger model may score ids that the tokenizer does not have
                scores = self.logits(module, context)[0, -1, : self.vocab_size].float().cpu()
                likeliest = (scores / TEMPERATURE).topk(min(TOP_K, self.vocab_size))
                choice = torch.multinomial(likeliest.values.softmax(-1), 1, generator=generator)
                tokens.append(int(likeliest.indices[choice]))
        return tokens[len(prompt) :]


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of each token from those before it, in nats."""
    return F.cross_entropy(logits.float().flatten(0, 1), batch["tokens"][:, 1:].flatten())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Have the module in evaluation mode, without gradients, until the block ends."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)
