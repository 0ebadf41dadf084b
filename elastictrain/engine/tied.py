"""A weight that the first stage of a pipeline owns and the last one uses too: an embedding that is the output head.

    owner      has it in its optimizer, and exports it
    borrower   sums its gradients in fp32 over the micro-batches, gives them to the owner before the update, and takes
               the new weights after it

Two copies with an optimizer each would drift apart by rounding: torch's fused AdamW rounds the last few elements of a
tensor otherwise, and the copies lie in different tensors. Cost: the weight and its gradient travel once a step, and the
borrower holds the latter in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class TiedWeights:
    """One end's side; the other end calls the same methods together with it."""

    def __init__(self, weights: Sequence[nn.Parameter], other_rank: int, owned: bool) -> None:
        self._weights, self._other, self._owned = weights, other_rank, owned
        self._sums = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
        pairs = [] if owned else zip(weights, self._sums, strict=True)
        self._hooks = [
            weight.register_post_accumulate_grad_hook(_summing_into(total))  # type: ignore[no-untyped-call]  # torch's
            for weight, total in pairs
        ]

    def give_gradients(self) -> None:
        """Add the borrower's gradients of this step to the owner's."""
        for weight, total in zip(self._weights, self._sums, strict=True):
            if self._owned:
                dist.recv(total, self._other)
                own = _sum_of(weight)
                own.view(-1).add_(total.view(-1))
            else:
                dist.send(total, self._other)
                total.zero_()

    def release(self) -> None:
        """Let go of the memory."""
        for hook in self._hooks:
            hook.remove()
        self._sums.clear()

    def lend(self) -> None:
        """Give the borrower the owner's weights."""
        for weight in self._weights:
            if self._owned:
                dist.send(weight.detach(), self._other)
            else:
                dist.recv(weight.detach(), self._other)


def _sum_of(weight: nn.Parameter) -> Tensor:
    """Where the gradients of the step are: DeepSpeed sums those of bf16 beside the weight, in fp32."""
    beside = ("_hp_grad", "grad_accum")  # BF16_Optimizer's, flat; ZeRO's, with offload
    sums = [getattr(weight, name, None) for name in beside]
    return next(total for total in (*sums, weight.grad) if total is not None)


def _summing_into(total: Tensor) -> Callable[[Tensor], None]:
    def add(weight: Tensor) -> None:
        assert weight.grad is not None, "a hook after its accumulation"
        total.add_(weight.grad)
        weight.grad = None

    return add
