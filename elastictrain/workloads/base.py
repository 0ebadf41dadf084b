"""The Protocol between what is trained and how it is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor, nn

from elastictrain.plan.model_shape import ModelShape
from elastictrain.plan.part import Part
from elastictrain.state.slab import Slab
from elastictrain.workloads.experts import Exchange
from elastictrain.workloads.sharing import Peers, SequencePeers

Batch = Mapping[str, Tensor]
"""Named tensors of one micro-batch, samples first. Language models: `tokens`, int64 [micro_batch, seq_len + 1]."""


class Workload(Protocol):
    """A model, its loss and its optimizer groups. The engine owns devices, precision, sharding and the optimizer."""

    def build(self, seed: int) -> nn.Module:
        """A new fp32 module on the CPU, initialised from `seed` alone: the same bits on every rank and layout."""
        ...

    def outline(self) -> nn.Module:
        """As `build`, where a state is loaded next: trainable parameters hold anything, or lie on torch's meta device.

        That saves drawing them, which takes 6 s for a thousand million on a processor.
        """
        ...

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Mean loss over the micro-batch's predictions, a scalar. `module` may be wrapped by an engine."""
        ...

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay applies: matrices yes, norms and biases no."""
        ...

    def take_gauges(self) -> Mapping[str, float]:
        """What else the losses since the last call showed, by name, as means over the micro-batches."""
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


class RepeatingWorkload(Workload, Protocol):
    """One whose model repeats a block."""

    def blocks(self, module: nn.Module) -> Iterable[nn.Module]:
        """What a module of this workload repeats: one of them is called after the other, with alike inputs."""
        ...


class SplitWorkload(RepeatingWorkload, Protocol):
    """One whose model can be built in parts, which different ranks hold."""

    @property
    def shape(self) -> ModelShape:
        """The model's sizes, by which it is dealt out."""
        ...

    @property
    def parameter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every trainable parameter of the whole model, in its order."""
        ...

    @property
    def tied(self) -> tuple[str, ...]:
        """Parameters that both the first part and the last hold where these are different ones."""
        ...

    def build_part(
        self,
        seed: int | None,
        part: Part,
        peers: Peers | None = None,
        exchange: Exchange | None = None,
        sequence: SequencePeers | None = None,
        loss_share: float = 1.0,
    ) -> nn.Module:
        """As `build`, a part: the same bits under the same names. Without a seed as `outline`.

        `peers` add up what `part.tp` ranks share; `exchange` takes tokens to the `part.ep` ranks that share experts;
        `sequence` are the `part.sp` ranks that share each sequence. `loss_share` is what a micro-batch's loss counts in
        its replica's, for a part that adds to the gradient without seeing the loss.
        """
        ...

    def is_expert(self, name: str) -> bool:
        """Whether the parameter of this name is of an expert, which only some ranks hold where experts are shared."""
        ...

    def slabs(self, part: Part) -> Mapping[str, Slab]:
        """Which elements of the whole's parameters a part has, for those that ranks share."""
        ...

    def positions_of(self, batch: Batch, part: Part) -> Batch:
        """What a part needs of a micro-batch to predict its own positions of each sequence."""
        ...

    def part_input(self, batch: Batch) -> Tensor:
        """What the first part takes; the others take the output of the one before."""
        ...

    def output_loss(self, module: nn.Module, output: Tensor, batch: Batch) -> Tensor:
        """Mean loss over the micro-batch's predictions, from what `module`, the last part of several, gave."""
        ...
