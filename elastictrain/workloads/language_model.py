"""This project's own language model: the transformer of `model.*`, built from a seed alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from elastictrain.plan.model_shape import ModelShape
from elastictrain.plan.part import Part
from elastictrain.planning import job_of
from elastictrain.state.slab import Slab
from elastictrain.workloads.causal import CausalLanguageModel
from elastictrain.workloads.sharing import Peers, SequencePeers
from elastictrain.workloads.transformer import Transformer, initialise, split_dimension


class LanguageModel(CausalLanguageModel):
    """Workload for `model.kind: transformer`."""

    def build(self, seed: int) -> nn.Module:
        """A new transformer; torch's global random state is neither read nor moved."""
        return self.build_part(seed, None, None)

    def build_part(
        self, seed: int, part: Part | None, peers: Peers | None, sequence: SequencePeers | None = None
    ) -> nn.Module:
        """See `base.SplitWorkload.build_part`; None is the whole."""
        # on meta first: the layers' own initialisation would cost time and draw from the global generator
        module = self._on_meta(part, peers, sequence)
        module.to_empty(device="cpu")
        initialise(module, seed, self.config.model.num_layers, self.parameter_shapes)
        return module

    def slabs(self, part: Part) -> Mapping[str, Slab]:
        """See `base.SplitWorkload.slabs`."""
        if part.tp == 1:
            return {}
        split = {name: (shape, split_dimension(name)) for name, shape in self.parameter_shapes.items()}
        return {
            name: Slab.of(shape, dimension, part.share(shape[dimension]))
            for name, (shape, dimension) in split.items()
            if dimension is not None
        }

    @property
    def parameter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `base.SplitWorkload.parameter_shapes`."""
        return {name: tuple(p.shape) for name, p in self._on_meta(None, None).named_parameters()}

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

    def _on_meta(self, part: Part | None, peers: Peers | None, sequence: SequencePeers | None = None) -> Transformer:
        recompute = self.config.train.activation_checkpointing
        with torch.device("meta"):
            return Transformer(self.config.model, self.vocab_size, recompute, part, peers, sequence)
