"""The streamed loss of ranks that share the vocabulary: the usual one's number and gradients, the same bits on all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import Rank, run_team
from torch import Tensor
from torch.nn import functional as F

from elastictrain.plan.activations import MOST_EXCHANGES
from elastictrain.plan.part import Part
from elastictrain.workloads.head_loss import streamed_cross_entropy
from elastictrain.workloads.sharing import Peers, Vocabulary

RANKS = 3
TOKENS, HIDDEN = (4, 33), 24
CASES = [
    (torch.float32, 23, 1.0),  # all rows at once
    (torch.float32, 301, 1.0),
    (torch.float32, 5000, 1.0),  # the most exchanges
    (torch.float32, 301, 1e4),  # of some ranks every score is too far below the highest for exp
    (torch.bfloat16, 301, 1.0),
]
"""(type, ids, by what the weight is multiplied)."""
Found = tuple[float, np.ndarray, np.ndarray, int]


def inputs(dtype: torch.dtype, vocabulary: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    vectors = torch.randn(*TOKENS, HIDDEN, generator=draw).to(dtype)
    weight = (scale * torch.randn(vocabulary, HIDDEN, generator=draw)).to(dtype)
    return vectors, weight, torch.randint(0, vocabulary, TOKENS, generator=draw)


def shared(me: Rank) -> list[Found]:
    """Loss, this rank's gradients, and how many collectives there were, of each case."""
    group = me.group(0, range(RANKS))
    group.form()
    exchanges = 0

    def gather(x: Tensor) -> Tensor:
        nonlocal exchanges
        exchanges += 1
        gathered = x.new_empty(RANKS * x.numel())
        dist.all_gather_into_tensor(gathered, x.flatten())
        return gathered.view(-1, *x.shape)

    found = []
    for dtype, size, scale in CASES:
        exchanges = 0
        vectors, weight, targets = inputs(dtype, size, scale)
        rows = Part(range(1), True, True, tp=RANKS, tp_index=me.index).share(size)
        own = weight[rows.start : rows.stop].clone().requires_grad_()
        vocabulary = Vocabulary(size, rows, Peers(RANKS, torch.clone, gather))
        loss = streamed_cross_entropy(vectors.requires_grad_(), own, targets, vocabulary)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        of_vectors, of_weight = (x.grad.double().numpy() for x in (vectors, own) if x.grad is not None)
        found.append((loss.item(), of_vectors, of_weight, exchanges))
    group.close()
    return found


@pytest.fixture(scope="module")
def by_rank() -> list[list[Found]]:
    return run_team(RANKS, shared)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{CASES[n][0]}-{CASES[n][1]}-{CASES[n][2]:g}")
def test_it_is_the_usual_loss_and_the_same_bits_on_all(by_rank: list[list[Found]], number: int) -> None:
    found = [of_rank[number] for of_rank in by_rank]
    dtype, *_ = case = CASES[number]
    vectors, weight, targets = inputs(*case)
    exact = vectors.double().requires_grad_(), weight.double().requires_grad_()
    loss = F.cross_entropy(F.linear(*exact).flatten(0, -2), targets.flatten())
    gradients = torch.autograd.grad(loss, exact)

    losses, of_vectors, of_weight, _ = zip(*found, strict=True)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert losses == (losses[0],) * RANKS
    assert losses[0] == pytest.approx(loss.item(), rel=tolerance)
    for ours, usual in zip((sum(of_vectors), np.concatenate(of_weight)), gradients, strict=True):
        assert np.linalg.norm(ours - usual.numpy()) <= tolerance * usual.norm()


def test_ranks_meet_a_few_times_for_each_micro_batch(by_rank: list[list[Found]]) -> None:
    exchanges = [exchanges for *_, exchanges in by_rank[0]]
    assert min(exchanges) == 1
    assert max(exchanges) == MOST_EXCHANGES - 1  # 132 tokens in groups of 9
