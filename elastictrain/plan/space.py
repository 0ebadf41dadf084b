"""The space of layouts: every legal way to spread one training step over a world of devices (pure).

    world = dp x pp x tp x sp          global batch = micro-batch x accumulation x dp

Ranks are placed so that the talkative ones are neighbours: tp innermost, then sp, then dp, then pp outermost (the
order of Narayanan et al. 2021, Takeaway 1). Experts are spread over data-parallel ranks, so ep divides dp x sp. The
rules that DeepSpeed sets (no ZeRO 2 or 3 under a pipeline, no ZeRO 3 with its experts) are rules here; what this
project's engines do not do yet is enumerated too: `choose.Job.runs` tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from elastictrain.plan.layout import RECOMPUTED, GradientDtype, Layout, Offload, Recompute
from elastictrain.plan.model_shape import ModelShape

OFFLOADS: tuple[Offload, ...] = ("none", "cpu", "nvme")
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
"""The more is recomputed, the less memory is needed."""
MOST_ACCUMULATION = 4096
"""Micro-batches of one rank in a step: more are not worth a look."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to train: the degrees of parallelism, what ZeRO shards, the micro-batch, and what is recomputed."""

    dp: int
    micro_batch: int
    accumulation: int
    zero_stage: int = 1
    pp: int = 1
    tp: int = 1
    ep: int = 1
    sp: int = 1
    offload: Offload = "none"
    gradient_dtype: GradientDtype = "fp32"
    activation_checkpointing: Recompute = "none"

    @property
    def world_size(self) -> int:
        """Ranks in the group."""
        return self.dp * self.pp * self.tp * self.sp

    @property
    def global_batch(self) -> int:
        """Sequences per step over all ranks."""
        return self.micro_batch * self.accumulation * self.dp

    @property
    def zero_group(self) -> int:
        """Ranks over which ZeRO shards, and gradients of what is not an expert are averaged."""
        return self.dp * self.sp

    @classmethod
    def of(cls, layout: Layout) -> Candidate:
        """The inverse of `layout`."""
        return cls(
            layout.dp,
            layout.micro_batch,
            layout.accumulation,
            layout.zero_stage,
            pp=layout.pp,
            tp=layout.tp,
            ep=layout.ep,
            sp=layout.sp,
            offload=layout.offload,
            gradient_dtype=layout.gradient_dtype,
            activation_checkpointing=layout.recompute,
        )

    def layout(self) -> Layout:
        """What the engine is built with."""
        return Layout(
            self.dp,
            self.zero_stage,
            self.micro_batch,
            self.accumulation,
            pp=self.pp,
            tp=self.tp,
            sp=self.sp,
            ep=self.ep,
            offload=self.offload,
            gradient_dtype=self.gradient_dtype,
            recompute=self.activation_checkpointing,
        )

    def __str__(self) -> str:
        degrees = [(n, getattr(self, n)) for n in ("dp", "pp", "tp", "ep", "sp")]
        words = [f"{name}{degree}" for name, degree in degrees if degree > 1 or name == "dp"]
        words += [f"zero{self.zero_stage}", f"{self.micro_batch}x{self.accumulation}"]
        words += [f"offload-{self.offload}"] * (self.offload != "none")
        words += [f"gradients-{self.gradient_dtype}"] * (self.gradient_dtype != "fp32")
        return " ".join(words) + RECOMPUTED[self.activation_checkpointing]

    def to_json(self) -> dict[str, Any]:
        """Plain fields."""
        return asdict(self) | {"world_size": self.world_size}


@dataclass(frozen=True, slots=True)
class Choices:
    """What may be varied; each field lists the values to look at. The default is data parallelism alone."""

    zero_stage: Sequence[int] = (0, 1, 2, 3)
    micro_batch: Sequence[int] | None = None
    """None means every size at which a step comes out whole."""
    activation_checkpointing: Sequence[Recompute] = RECOMPUTES
    pp: Sequence[int] = (1,)
    tp: Sequence[int] = (1,)
    ep: Sequence[int] = (1,)
    sp: Sequence[int] = (1,)
    offload: Sequence[Offload] = ("none",)
    gradient_dtype: GradientDtype = "fp32"
    """The same for all: it is asked for, never chosen."""
    most_tp_sp: int | None = None
    """Most ranks of tensor and sequence parallelism together; None means any number."""


def splits_of(shape: ModelShape, world_size: int, devices_per_node: int) -> Choices:
    """The ways to deal one model out that the engines run.

    Its layers go to stages and its matrices to the workers of a node; besides its experts to replicas, or, where it has
    none, its sequences to the workers of a node.
    """
    by = divisors(world_size)
    within_node = [d for d in by if d <= devices_per_node]
    split = Choices(pp=[d for d in by if d <= shape.num_layers], tp=within_node, most_tp_sp=devices_per_node)
    if shape.num_experts > 1:
        return replace(split, ep=[d for d in by if shape.num_experts % d == 0])
    return replace(split, sp=within_node)


def everything(shape: ModelShape, world_size: int, devices_per_node: int, nvme: bool = False) -> Choices:
    """Every degree worth a look: tensor and sequence parallelism stay within a node, whose links they need."""
    offloads = OFFLOADS if nvme else OFFLOADS[:2]
    within_node = [d for d in divisors(world_size) if d <= devices_per_node]
    stages = [d for d in divisors(world_size) if d <= shape.num_layers]
    experts = [d for d in divisors(world_size) if shape.num_experts % d == 0]
    return Choices(pp=stages, tp=within_node, ep=experts, sp=within_node, offload=offloads, most_tp_sp=devices_per_node)


def enumerate_layouts(
    shape: ModelShape, world_size: int, global_batch: int, choices: Choices | None = None
) -> Iterator[Candidate]:
    """Every legal candidate of this world, each once."""
    choices = choices or Choices()
    for pp in choices.pp:
        for tp in choices.tp:
            for sp in choices.sp:
                dp, rest = divmod(world_size, pp * tp * sp)
                if tp * sp > (choices.most_tp_sp or world_size):
                    continue
                if rest or global_batch % dp or not _divides(shape, pp, tp, sp):
                    continue
                yield from _of_degrees(shape, dp, pp, tp, sp, global_batch, choices)


def _of_degrees(
    shape: ModelShape, dp: int, pp: int, tp: int, sp: int, global_batch: int, choices: Choices
) -> Iterator[Candidate]:
    share = global_batch // dp
    sizes = divisors(share) if choices.micro_batch is None else [m for m in choices.micro_batch if share % m == 0]
    for micro_batch in sizes:
        if share // micro_batch > MOST_ACCUMULATION:
            continue
        for ep in choices.ep:
            if shape.num_experts % ep or (dp * sp) % ep:
                continue
            for stage in choices.zero_stage:
                if (stage >= 2 and pp > 1) or (stage == 3 and ep > 1) or not sends(stage, choices.gradient_dtype):
                    continue
                for offload in choices.offload:
                    # Optimizer state is offloaded in shards; with a pipeline, which shares it out as well, only where
                    # that alone is asked for: so the search stays small.
                    if offload != "none" and (stage == 0 or (pp > 1 and len(choices.offload) > 1)):
                        continue
                    for recompute in choices.activation_checkpointing:
                        yield Candidate(
                            dp,
                            micro_batch,
                            share // micro_batch,
                            stage,
                            pp,
                            tp,
                            ep,
                            sp,
                            offload,
                            choices.gradient_dtype,
                            recompute,
                        )


def sends(zero_stage: int, gradient_dtype: GradientDtype) -> bool:
    """Whether gradients can travel so: DeepSpeed quantises none but those that it scatters, at stage 3."""
    return gradient_dtype != "int8" or zero_stage == 3


def _divides(shape: ModelShape, pp: int, tp: int, sp: int) -> bool:
    heads = shape.num_heads % (tp * sp) == 0 and shape.num_kv_heads % tp == 0
    return heads and shape.seq_len % sp == 0 and pp <= shape.num_layers


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]
