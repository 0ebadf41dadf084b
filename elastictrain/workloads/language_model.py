"""This project's own language model: the transformer of `model.*`, built from a seed alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elastictrain.workloads.causal import CausalLanguageModel
from elastictrain.workloads.transformer import Transformer, initialise


class LanguageModel(CausalLanguageModel):
    """Workload for `model.kind: transformer`."""

    def build(self, seed: int) -> nn.Module:
        """A new transformer; torch's global random state is neither read nor moved."""
        # on meta first: the layers' own initialisation would cost time and draw from the global generator
        with torch.device("meta"):
            module = Transformer(self.config.model, self.vocab_size, self.config.train.activation_checkpointing)
        module.to_empty(device="cpu")
        initialise(module, seed)
        return module

    def logits(self, module: nn.Module, tokens: Tensor) -> Tensor:
        """The transformer's output as it is."""
        logits: Tensor = module(tokens)
        return logits
