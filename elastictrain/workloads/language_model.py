"""This project's own language model: the transformer of `model.*`, built from a seed or from a folder's weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from elastictrain.config import TrainConfig
from elastictrain.errors import ConfigError
from elastictrain.plan.model_shape import ModelShape
from elastictrain.plan.part import Part
from elastictrain.planning import STREAMED, job_of
from elastictrain.state.slab import Slab
from elastictrain.workloads.base import Batch
from elastictrain.workloads.causal import CausalLanguageModel, next_token_loss
from elastictrain.workloads.experts import Balancing, Exchange, is_expert
from elastictrain.workloads.llama import llama_names
from elastictrain.workloads.outlined import with_memory
from elastictrain.workloads.sharing import Peers, SequencePeers
from elastictrain.workloads.stored_weights import StoredWeights, has_weights
from elastictrain.workloads.transformer import Transformer, initialise, split_dimension


class LanguageModel(CausalLanguageModel):
    """Workload for `model.kind: transformer`."""

    def __init__(self, config: TrainConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self._gauged, self._num_gauged = torch.zeros(2), 0
        self._num_rows = config.model.vocab_size or vocab_size
        if self._num_rows < vocab_size:
            raise ConfigError(
                f"model.vocab_size {self._num_rows} is smaller than the tokenizer's {vocab_size}: give the model's own "
                "tokenizer as data.tokenizer, or lower data.vocab_size"
            )
        self._stored = None
        folder = Path(config.model.path).expanduser() if config.model.path else None
        if folder is not None and has_weights(folder):
            self._stored = StoredWeights(folder, llama_names(config.model), self.parameter_shapes)

    def build(self, seed: int) -> nn.Module:
        """A new transformer; torch's global random state is neither read nor moved."""
        return self.build_part(seed, None)

    def outline(self) -> nn.Module:
        """See `base.Workload.outline`."""
        return self.build_part(None, None)

    def build_part(
        self,
        seed: int | None,
        part: Part | None,
        peers: Peers | None = None,
        exchange: Exchange | None = None,
        sequence: SequencePeers | None = None,
        loss_share: float = 1.0,
    ) -> nn.Module:
        """See `base.SplitWorkload.build_part`; None is the whole."""
        sees_loss = part is None or (part.first and part.last)
        balancing = None if sees_loss else Balancing(self.config.model.load_balance * loss_share, self._gauge)
        # on meta first: the layers' own initialisation would cost time and draw from the global generator
        module = self._on_meta(part, peers, exchange, sequence, balancing)
        if seed is None:
            return module
        with_memory(module, torch.float32, torch.device("cpu"))
        if self._stored is None:
            initialise(module, seed, self.config.model.num_layers, self.parameter_shapes)
        else:
            self._stored.fill(module, {} if part is None else self._shares(part))
        return module

    def _shares(self, part: Part) -> Mapping[str, tuple[int, range]]:
        """Of the weights that `part.tp` ranks share: the dimension by which they do, and this one's numbers of it."""
        split = {name: (shape, split_dimension(name)) for name, shape in self.parameter_shapes.items()}
        return {
            name: (dimension, part.share(shape[dimension]))
            for name, (shape, dimension) in split.items()
            if dimension is not None
        }

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats; with experts its gradient is that of the balance loss too."""
        loss, told = self._scored(module, batch)
        if told is None:
            return loss
        self._gauge(told.detach())
        balance = self.config.model.load_balance * told[:, 0].sum()
        return loss + (balance - balance.detach())

    def _gauge(self, told: Tensor) -> None:
        self._gauged = self._gauged.to(told.device) + told[:, 1:].mean(0)
        self._num_gauged += 1

    def _scored(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The mean cross-entropy, and what routers tell if there are any."""
        if self.config.train.dtype in STREAMED:
            found = module(self.part_input(batch), batch["tokens"][:, 1:])
            return found if isinstance(found, tuple) else (found, None)
        found = module(self.part_input(batch))
        logits, told = found if isinstance(found, tuple) else (found, None)
        return next_token_loss(logits, batch), told

    def output_loss(self, module: nn.Module, output: Tensor, batch: Batch) -> Tensor:
        """See `base.SplitWorkload.output_loss`; no model with fp16 is split, so it is always streamed."""
        return cast(Transformer, module).score(output, batch["tokens"][:, 1:])

    def cross_entropy(self, module: nn.Module, batch: Batch) -> Tensor:
        """See `causal.CausalLanguageModel.cross_entropy`."""
        return self._scored(module, batch)[0]

    def take_gauges(self) -> Mapping[str, float]:
        """How even the experts were, as means over blocks and micro-batches: see `experts.Routing.told`."""
        if not self._num_gauged:
            return {}
        busiest, dropped = (self._gauged / self._num_gauged).tolist()
        self._gauged, self._num_gauged = torch.zeros(2), 0
        return {"busiest_expert": busiest, "dropped_tokens": dropped}

    def blocks(self, module: nn.Module) -> Iterable[nn.Module]:
        """See `base.RepeatingWorkload.blocks`."""
        return cast(Transformer, module).blocks.values()

    def is_expert(self, name: str) -> bool:
        """See `base.SplitWorkload.is_expert`."""
        return is_expert(name)

    def slabs(self, part: Part) -> Mapping[str, Slab]:
        """See `base.SplitWorkload.slabs`."""
        if part.tp == 1:
            return {}
        shapes = self.parameter_shapes
        return {name: Slab.of(shapes[name], *share) for name, share in self._shares(part).items()}

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
        return replace(job_of(self.config).shape, vocab_size=self._num_rows)

    def logits(self, module: nn.Module, tokens: Tensor) -> Tensor:
        """The transformer's output, without what routers tell."""
        output = module(tokens)
        logits: Tensor = output if self.config.model.num_experts is None else output[0]
        return logits

    def _on_meta(
        self,
        part: Part | None,
        peers: Peers | None = None,
        exchange: Exchange | None = None,
        sequence: SequencePeers | None = None,
        balancing: Balancing | None = None,
    ) -> Transformer:
        recompute = self.config.train.activation_checkpointing or "none"
        with torch.device("meta"):
            model = self.config.model
            return Transformer(model, self._num_rows, recompute, part, peers, exchange, sequence, balancing)
