"""What one rank holds of a model that is split over several (pure).

Blocks are dealt to the stages of a pipeline by what they cost, not by their number: the output head of a large
vocabulary costs as much as some blocks, so the stage that has it gets fewer. The embedding costs nearly nothing and
lies in the first stage; the final norm and the head lie in the last, which holds a copy of a tied embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastictrain.plan.layout import Layout
from elastictrain.plan.model_shape import ModelShape


@dataclass(frozen=True, slots=True)
class Part:
    """Of one rank."""

    blocks: range
    """Numbers of its blocks in the whole model."""
    first: bool
    """Whether it turns tokens into vectors."""
    last: bool
    """Whether it turns vectors into scores."""
    tp: int = 1
    """Ranks that share each of its matrices."""
    tp_index: int = 0
    """Which of them this is."""
    ep: int = 1
    """Ranks among which the experts of each layer are shared out."""
    ep_index: int = 0
    """Which of them this is."""

    sp: int = 1
    """Ranks that share each sequence."""
    sp_index: int = 0
    """Which of them this is."""

    def experts(self, num_experts: int) -> range:
        """The numbers of this rank's experts in each layer."""
        return range(num_experts * self.ep_index // self.ep, num_experts * (self.ep_index + 1) // self.ep)

    def positions(self, seq_len: int) -> range:
        """This rank's positions of a sequence of so many."""
        return range(seq_len * self.sp_index // self.sp, seq_len * (self.sp_index + 1) // self.sp)

    def share(self, size: int) -> range:
        """This rank's numbers of a dimension of so many; where they can't be equal, shares differ by one."""
        return range(size * self.tp_index // self.tp, size * (self.tp_index + 1) // self.tp)


def part_of(shape: ModelShape, layout: Layout, rank: int) -> Part:
    """What this rank holds."""
    place = layout.place(rank)
    stage = place.pp
    dealt = deal_blocks(shape, layout.pp)
    start = sum(dealt[:stage])
    blocks = range(start, start + dealt[stage])
    return Part(
        blocks,
        first=stage == 0,
        last=stage == layout.pp - 1,
        tp=layout.tp,
        tp_index=place.tp,
        sp=layout.sp,
        sp_index=place.sp,
        ep=layout.ep,
        ep_index=place.dp % layout.ep,
    )


def deal_blocks(shape: ModelShape, num_stages: int) -> tuple[int, ...]:
    """Blocks of each stage, so that the slowest stage is as fast as can be; of equals the most even, early ones first.

    A block costs its floating point operations, and so does the head. No stage is without a block: DeepSpeed's ZeRO
    takes norms by kind of parameter, all stages together, so each must have some of every kind.
    """
    if num_stages == 1:
        return (shape.num_layers,)
    head = shape.head_flops_per_token / shape.layer_flops_per_token(causal=shape.skips_masked)
    others = num_stages - 1

    def cost(of_last: int) -> tuple[float, int]:
        of_others = -(-(shape.num_layers - of_last) // others)
        return max(of_others, of_last + head), of_others

    of_last = min(range(1, shape.num_layers - others + 1), key=lambda n: (*cost(n), -n))
    each, more = divmod(shape.num_layers - of_last, others)
    return (*(each + (stage < more) for stage in range(others)), of_last)
