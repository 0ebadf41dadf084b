"""A mixture of experts in place of a block's MLP: each token's vector goes to one or two of many SwiGLUs.

    router     probabilities p = softmax(W x), in fp32 whatever the model's type (Fedus et al. 2021, "Switch
               Transformers", arXiv:2101.03961, section 2.4)
    gating     one expert: it weighs p (Switch, section 2.1). Two: their p, scaled to add up to 1 (Lepikhin et al. 2020,
               "GShard", arXiv:2006.16668, section 2.2; Mixtral, arXiv:2401.04088, section 2.1)
    capacity   in training an expert takes at most ceil(capacity_factor x choices / experts) tokens of a micro-batch
               (Switch, section 2.2), first choices before second ones, then in the order of the tokens (GShard,
               algorithm 1). A token that finds no room adds nothing here: the residual stream carries it on
    balance    experts x sum over experts of (share of the choices x mean p): 1 where all are chosen alike (Switch,
               equations 4 to 6; for two experts over both choices)

All of it is computed over one micro-batch of one rank, so that it depends on no layout. In evaluation every expert
takes whatever comes. Deterministic: what is added up are at most two vectors a token, in a fixed order.

With expert parallelism a rank holds some of the experts, and `Exchange` takes the tokens to them and back: all experts'
places travel, used or not, so the sizes are the same in every step. With tensor parallelism it holds its share of each
expert's matrices: the tp ranks route the same tokens alike, and the sum of their terms is made once, over the tokens,
as for a dense MLP. In a pipeline a stage adds the balance loss of its own routers to its own gradient (`Balancing`).

Cost: capacity_factor x experts_per_token times that of one SwiGLU of the same width, whatever the number of experts;
with expert parallelism two all-to-alls of capacity_factor x experts_per_token x [batch, seq, hidden] in each pass; with
tensor parallelism what a dense MLP costs, one sum of [batch, seq, hidden] in each pass. In evaluation every expert has
the room of the busiest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastictrain.config import ModelSection
from elastictrain.workloads.sharing import Peers, enter, leave, trade


@dataclass(frozen=True, slots=True)
class Exchange:
    """The ranks that share the experts of each layer."""

    swap: Callable[[Tensor], Tensor]
    """Gives rank i the i-th part of x, along the first dimension, and returns the parts that the ranks gave this one.

    Done twice it undoes itself, so it is its own gradient.
    """


@dataclass(frozen=True, slots=True)
class Balancing:
    """What a part of the model that does not see the loss does with what its routers tell."""

    weight: float
    """Of the balance loss of one micro-batch in the gradient of a step."""
    tell: Callable[[Tensor], None]
    """Is given what each router told, [blocks, 3], detached."""

    def attach(self, hidden: Tensor, told: Tensor) -> Tensor:
        """The same vectors; their backward pass begins the balance loss's too."""
        self.tell(told.detach())
        return cast(Tensor, _Attached.apply(hidden, told[:, 0].sum(), self.weight))  # type: ignore[no-untyped-call]  # torch's


class Routing(NamedTuple):
    """Where the tokens of a micro-batch go."""

    slots: Tensor
    """[choices, tokens]: the place in all experts' room, expert by expert; the one after the last for no place."""
    weights: Tensor
    """[choices, tokens]: how much of the expert's output a token takes; differentiable."""
    capacity: int
    """Places of each expert."""
    told: Tensor
    """fp32 [3]: the balance loss, differentiable; the busiest expert's choices over the mean; the share of choices that
    found no place."""


def route(probabilities: Tensor, num_choices: int, capacity_factor: float | None) -> Routing:
    """Of each token's probabilities [tokens, experts]; without a factor there is room for all."""
    num_tokens, num_experts = probabilities.shape
    chosen = probabilities.topk(num_choices, dim=-1)
    weights = chosen.values / chosen.values.sum(-1, keepdim=True) if num_choices > 1 else chosen.values
    experts = chosen.indices.T.flatten()  # all first choices, then all second ones
    counts = F.one_hot(experts, num_experts)
    # how many came before to the same expert
    position = (counts.cumsum(0) - counts).gather(1, experts.unsqueeze(1)).squeeze(1)
    load = counts.sum(0)
    if capacity_factor is None:
        capacity = int(load.max())
    else:
        capacity = min(num_tokens, math.ceil(capacity_factor * len(experts) / num_experts))
    finds_room = position < capacity
    slots = (experts * capacity + position).where(finds_room, num_experts * capacity)
    share = load / len(experts)
    balance = num_experts * (share * probabilities.mean(0)).sum()
    told = torch.stack((balance, num_experts * share.max(), 1 - finds_room.float().mean()))
    return Routing(slots.view(num_choices, num_tokens), weights.T, capacity, told)


class MixtureOfExperts(nn.Module):
    """Takes and gives [batch, seq, hidden]; besides gives what `Routing.told` is of its router.

    `experts` are those that this rank holds, by their number among all; where `peers` share each of them, their outputs
    are terms of the sum.
    """

    def __init__(
        self,
        router: Router,
        experts: Mapping[int, nn.Module],
        model: ModelSection,
        exchange: Exchange | None = None,
        peers: Peers | None = None,
    ) -> None:
        super().__init__()
        self.router, self.peers = router, peers
        self.experts = nn.ModuleDict({str(number): expert for number, expert in experts.items()})
        self.num_experts, self.experts_per_token = router.weight.shape[0], model.experts_per_token
        self.capacity_factor, self.exchange = model.capacity_factor, exchange

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's vector, through its experts."""
        tokens = hidden.flatten(0, 1)
        factor = self.capacity_factor if self.training else None
        routing = route(self.router(tokens), self.experts_per_token, factor)
        # the router is the same on all peers, and reads what they all have; what follows gives each a term of the sum
        tokens, mixing = enter(tokens, self.peers), enter(routing.weights, self.peers)
        room = tokens.new_zeros(self.num_experts * routing.capacity + 1, tokens.shape[-1])
        for slots in routing.slots:  # unlike index_add, copies to places of their own give the same bits every time
            room = room.index_copy(0, slots, tokens)
        done = self._through_experts(room[:-1].view(self.num_experts, routing.capacity, -1)).flatten(0, 1)
        done = torch.cat((done, done.new_zeros(1, done.shape[-1])))
        mixed = torch.zeros_like(tokens)
        for slots, weights in zip(routing.slots, mixing, strict=True):
            mixed = mixed + weights.unsqueeze(-1).to(done.dtype) * done.index_select(0, slots)
        return leave(mixed, self.peers).view_as(hidden), routing.told

    def _through_experts(self, room: Tensor) -> Tensor:
        """[experts, capacity, hidden] of all experts, each through its own."""
        _, capacity, hidden_size = room.shape
        num_mine, num_ranks = len(self.experts), self.num_experts // len(self.experts)
        # [ranks that they come from, this rank's experts, capacity, hidden]
        come = self._traded(room).view(num_ranks, num_mine, capacity, hidden_size)
        mine = come.transpose(0, 1).reshape(num_mine, num_ranks * capacity, hidden_size)
        done = torch.stack([expert(x) for expert, x in zip(self.experts.values(), mine, strict=True)])
        gone = done.view(num_mine, num_ranks, capacity, hidden_size).transpose(0, 1)
        return self._traded(gone.reshape(room.shape))

    def _traded(self, x: Tensor) -> Tensor:
        """See `Exchange.swap`; nothing where each rank has all experts."""
        return x if self.exchange is None else trade(x, self.exchange.swap)


class Router(nn.Module):
    """Probabilities of the experts, fp32 [tokens, experts]."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, tokens: Tensor) -> Tensor:
        """Of these vectors [tokens, hidden]."""
        return F.linear(tokens.float(), self.weight.float()).softmax(-1)


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight, ctx.dtype = weight, loss.dtype
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], gradients[0].new_tensor(ctx.weight, dtype=ctx.dtype), None


def is_expert(name: str) -> bool:
    """Whether the parameter of this name is of one of the experts."""
    return ".experts." in name
