"""This project's own language model: the transformer of `model.*`, built from a seed alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from elastictrain.plan.model_shape import ModelShape
from elastictrain.plan.part import Part
from elastictrain.planning import job_of
from elastictrain.workloads.causal import CausalLanguageModel
from elastictrain.workloads.transformer import Transformer, initialise


class LanguageModel(CausalLanguageModel):
    """Workload for `model.kind: transformer`."""

    def build(self, seed: int) -> nn.Module:
        """A new transformer; torch's global random state is neither read nor moved."""
        return self.build_part(seed, None)

    def build_part(self, seed: int, part: Part | None) -> nn.Module:
        """See `base.SplitWorkload.build_part`; None is the whole."""
        # on meta first: the layers' own initialisation would cost time and draw from the global generator
        module = self._on_meta(part)
        module.to_empty(device="cpu")
        initialise(module, seed, self.config.model.num_layers)
        return module

    @property
    def parameter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `base.SplitWorkload.parameter_shapes`."""
        return {name: tuple(p.shape) for name, p in self._on_meta(None).named_parameters()}

    @property
    def tied(self) -> tuple[str, ...]:
        """See `base.SplitWorkload.tied`."""
        return ("embedding.weight",) if self.config.model.tie_embeddings else ()

    @property
    def shape(self) -> ModelShape:
        """See `base.SplitWorkload.shape`."""
        return replace(job_of(self.config).shape, vocab_size=self.vocab_size)

    def logits(self, module: nn.Module, tokens: Tensor) -> Tensor:
        """The transformer's output as it is."""
        logits: Tensor = module(tokens)
        return logits

    def _on_meta(self, part: Part | None) -> Transformer:
        with torch.device("meta"):
            return Transformer(self.config.model, self.vocab_size, self.config.train.activation_checkpointing, part)
