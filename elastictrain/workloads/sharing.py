"""What goes on between ranks that share a layer, or a sequence.

Tensor parallelism, after Shoeybi et al. 2019 (Megatron-LM):

    h = enter(x)        the same x on all; their gradients are summed
    y = rows of W h     each rank has its own rows of W, and so its own part of y
    z = columns of V y  each has the matching columns of V, and so a term of z
    leave(z)            the sum, the same on all

The vocabulary is split too (`Vocabulary`): the embedding's rows, and with them the scores (`head_loss`). Who the ranks
are, and how they add, is the engine's: `Peers`. Sums are made in fp32, and are the same bits on all.
Cost: two sums of [batch, seq, hidden] in a block's forward pass, and two in its backward pass.

Sequence parallelism, after Jacobs et al. 2023 (DeepSpeed-Ulysses):

    q, k, v = to_heads(q, k, v)     from all heads of a rank's own positions to all positions of its own heads
    y = to_positions(attention)     and back

Cost: one exchange of q, k and v and one of y in a block's forward pass, the same in its backward pass; each of n ranks
sends (n - 1) / n of what it has, and has 1 / n of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Peers:
    """The ranks that share each matrix of a part; both calls give a new tensor, the same on all."""

    size: int
    sum: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]
    """Of each rank's [...]: all of them, [size, ...]."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The ids whose rows of the embedding and of the head a rank has."""

    size: int
    """All there are, on whatever ranks."""
    rows: range
    peers: Peers | None = None
    """The ranks that have the others; None where this one has all."""

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these ids are this rank's, and their numbers among its rows, 0 for others'."""
        mine = (ids >= self.rows.start) & (ids < self.rows.stop)
        return mine, (ids - self.rows.start).where(mine, 0)


@dataclass(frozen=True, slots=True)
class SequencePeers:
    """The ranks that share each sequence of a micro-batch."""

    size: int
    exchange: Callable[[Tensor], Tensor]
    """Of [size, ...]: row i goes to the i-th of them, and gives a new tensor, whose row i came from it."""


def enter(x: Tensor, peers: Peers | None) -> Tensor:
    """To what is split; None where nothing is."""
    return x if peers is None else cast(Tensor, _Enter.apply(x, peers))  # type: ignore[no-untyped-call]  # torch's


def leave(x: Tensor, peers: Peers | None) -> Tensor:
    """From what is split: the sum of all ranks' terms."""
    return x if peers is None else cast(Tensor, _Leave.apply(x, peers))  # type: ignore[no-untyped-call]  # torch's


def embed(ids: Tensor, weight: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Vectors of these ids; `weight` has this rank's rows."""
    if vocabulary.peers is None:
        return F.embedding(ids, weight)
    mine, numbers = vocabulary.find(ids)
    return leave(F.embedding(numbers, weight).where(mine.unsqueeze(-1), 0.0), vocabulary.peers)


def to_heads(parts: Sequence[Tensor], peers: SequencePeers | None) -> tuple[Tensor, ...]:
    """Each [batch, heads, positions, width] to [batch, heads / n, n x positions, width]."""
    if peers is None:
        return tuple(parts)
    by_rank = [x.reshape(len(x), peers.size, -1, *x.shape[2:]) for x in parts]
    there = torch.cat(by_rank, dim=2).movedim(1, 0)  # [n, batch, heads of all parts / n, positions, width]
    here = trade(there, peers.exchange).movedim(0, 2).flatten(2, 3)
    return here.split_with_sizes([x.shape[2] for x in by_rank], dim=1)


def to_positions(x: Tensor, peers: SequencePeers | None) -> Tensor:
    """The inverse of `to_heads`, of one part."""
    if peers is None:
        return x
    there = x.reshape(*x.shape[:2], peers.size, -1, x.shape[3]).movedim(2, 0)  # [n, batch, heads / n, positions, width]
    return trade(there, peers.exchange).movedim(0, 1).flatten(1, 2)


def trade(x: Tensor, exchange: Callable[[Tensor], Tensor]) -> Tensor:
    """An exchange of all with all that undoes itself when done twice: its gradient is the same exchange."""
    return cast(Tensor, _Trade.apply(x.contiguous(), exchange))  # type: ignore[no-untyped-call]  # torch's


class _Trade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.exchange = exchange
        return exchange(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.exchange(gradients[0].contiguous()), None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.peers.sum(gradients[0]), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        return peers.sum(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None
