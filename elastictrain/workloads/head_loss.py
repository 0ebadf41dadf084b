"""Next-token cross-entropy from vectors and the head's weight; the scores of a micro-batch are never all there.

The scores [tokens, vocabulary] of a language model are its largest tensor by far, and the usual loss holds three of
them. Here they are made for some rows at a time, and turned at once into those rows' loss and gradients, of the vectors
and of the weight; the backward pass only scales these. The idea is that of Hsu et al. 2024 (Liger Kernel,
arXiv:2410.10989), in plain torch, so it runs on every device; sums over the vocabulary are done in fp32.

Where ranks share the vocabulary, as in Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053, section 3), each has the
scores of its own ids. For some rows at a time they tell each other, in one collective, each row's highest score, the
sum of its exponentials below that, and the score of what came next. All put these together alike, so their losses are
the same bits.

Rows are as many as make their scores as large as the vectors, or as a quarter of the weight's gradient. Cost: the three
matrix products that the usual way has too; memory 4 x vocabulary x hidden bytes for the weight's gradient, and the
rows' scores; with shared ids at most `plan.activations.MOST_EXCHANGES` collectives of 12 bytes a row and rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from elastictrain.plan.activations import scored_at_once
from elastictrain.workloads.sharing import Peers, Vocabulary


def streamed_cross_entropy(
    vectors: Tensor, weight: Tensor, targets: Tensor, vocabulary: Vocabulary | None = None
) -> Tensor:
    """Mean loss in nats, fp32, of vectors [..., hidden] whose next tokens are `targets` [...]; weight [rows, hidden].

    `vocabulary` says which ids the weight's rows are; None for all. Where ranks share it this is a collective, and the
    gradient of the vectors is this rank's term of it.
    Not for fp16: gradients would be rounded before the loss scale has made them large enough.
    """
    loss = _Streamed.apply(  # type: ignore[no-untyped-call]  # torch's
        vectors.flatten(0, -2),
        weight,
        targets.flatten(),
        vocabulary or Vocabulary(len(weight), range(len(weight))),
        torch.is_grad_enabled(),
    )
    return cast(Tensor, loss)


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, vectors: Tensor, weight: Tensor, targets: Tensor, vocabulary: Vocabulary, trains: bool
    ) -> Tensor:
        tokens, hidden = vectors.shape
        loss = torch.zeros((), dtype=torch.float32, device=vectors.device)
        of_vectors = torch.empty_like(vectors) if trains else None
        of_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if trains else None
        rows = scored_at_once(tokens, hidden, vocabulary.size, vocabulary.peers.size if vocabulary.peers else 1)
        for first in range(0, tokens, rows):
            some = vectors[first : first + rows]
            mine, chosen = vocabulary.find(targets[first : first + rows, None])
            scores = torch.mm(some, weight.t()).float()
            of_chosen = scores.gather(1, chosen).where(mine, 0.0)
            highest = scores.amax(1, keepdim=True)
            total = own_total = scores.sub_(highest).exp_().sum(1, keepdim=True)
            if vocabulary.peers is not None:
                highest, total, own_total, of_chosen = _of_all(vocabulary.peers, highest, total, of_chosen)
            loss += (total.log() - (of_chosen - highest)).sum()
            if of_vectors is None or of_weight is None:
                continue
            scores /= own_total  # the probabilities; less one for what came next they are the loss's gradient
            scores.scatter_add_(1, chosen, -mine.to(scores.dtype))
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
        return of_vectors.mul_(share), of_weight.mul_(share).to(of_vectors.dtype), None, None, None


def _of_all(peers: Peers, highest: Tensor, total: Tensor, of_chosen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From what each rank has of some rows, [rows, 1]: the highest score of all ids, the sum of exponentials below it,
    the same below this rank's own highest score, and the score of what came next, which one rank has.
    """
    told = peers.gather(torch.stack((highest, total, of_chosen)))  # [ranks, 3, rows, 1]
    highests, totals, of_chosens = told.unbind(1)
    top = highests.amax(0)
    sums = (totals * (highests - top).exp()).sum(0)
    # the second is infinite where all of this rank's scores are far below: it then divides them to 0, as it must
    return top, sums, sums / (highest - top).exp(), of_chosens.sum(0)
