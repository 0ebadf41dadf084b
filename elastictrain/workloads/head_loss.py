"""Next-token cross-entropy from vectors and the head's weight; the scores of a micro-batch are never all there.

The scores [tokens, vocabulary] of a language model are its largest tensor by far, and the usual loss holds three of
them. Here they are made for some rows at a time, and turned at once into those rows' loss and gradients, of the vectors
and of the weight; the backward pass only scales these. The idea is that of Hsu et al. 2024 (Liger Kernel,
arXiv:2410.10989), in plain torch, so it runs on every device; sums over the vocabulary are done in fp32.

Rows are as many as make their scores as large as the vectors. Cost: the three matrix products that the usual way has
too; memory 4 x vocabulary x hidden bytes for the weight's gradient, and the rows' scores.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from elastictrain.plan.activations import scored_at_once


def streamed_cross_entropy(vectors: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean loss in nats, fp32, of vectors [..., hidden] whose next tokens are `targets` [...]; weight [vocab, hidden].

    Not for fp16: gradients would be rounded before the loss scale has made them large enough.
    """
    loss = _Streamed.apply(  # type: ignore[no-untyped-call]  # torch's
        vectors.flatten(0, -2), weight, targets.flatten(), torch.is_grad_enabled()
    )
    return cast(Tensor, loss)


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, weight: Tensor, targets: Tensor, trains: bool) -> Tensor:
        (tokens, hidden), vocabulary = vectors.shape, len(weight)
        loss = torch.zeros((), dtype=torch.float32, device=vectors.device)
        of_vectors = torch.empty_like(vectors) if trains else None
        of_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if trains else None
        rows = scored_at_once(tokens, hidden, vocabulary)
        for first in range(0, tokens, rows):
            some, chosen = vectors[first : first + rows], targets[first : first + rows, None]
            scores = torch.mm(some, weight.t()).float()
            scores -= scores.amax(1, keepdim=True)
            of_chosen = scores.gather(1, chosen)
            total = scores.exp_().sum(1, keepdim=True)
            loss += (total.log() - of_chosen).sum()
            if of_vectors is None or of_weight is None:
                continue
            scores /= total  # the probabilities; less one for what came next they are the loss's gradient
            scores.scatter_add_(1, chosen, scores.new_full(chosen.shape, -1.0))
            gradient = scores.to(vectors.dtype)
            torch.mm(gradient, weight, out=of_vectors[first : first + rows])
            if of_weight.dtype == gradient.dtype:
                of_weight.addmm_(gradient.t(), some)
            else:
                of_weight += torch.mm(gradient.t(), some)
        ctx.gradients, ctx.tokens = (of_vectors, of_weight), tokens
        return loss / tokens

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        (of_vectors, of_weight), ctx.gradients = ctx.gradients, None  # the memory is theirs who get it
        share = gradients[0] / ctx.tokens
        return of_vectors.mul_(share), of_weight.mul_(share).to(of_vectors.dtype), None, None
