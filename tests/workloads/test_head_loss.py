"""The streamed loss is the usual one: the same number and gradients, and never all scores at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from elastictrain.workloads.head_loss import streamed_cross_entropy

TOKENS, HIDDEN, VOCABULARY = (4, 33), 24, 301


def usual_loss(vectors: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(vectors, weight).float().flatten(0, -2), targets.flatten())


def inputs(dtype: torch.dtype = torch.float32, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    vectors = torch.randn(*TOKENS, HIDDEN, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, HIDDEN, generator=draw).to(dtype).requires_grad_()
    return vectors, weight, torch.randint(0, vocabulary, TOKENS, generator=draw)


def loss_and_gradients(way: Any, dtype: torch.dtype, vocabulary: int, scale: float = 1.0) -> list[Tensor]:
    vectors, weight, targets = inputs(dtype, vocabulary)
    loss = way(vectors, weight, targets)
    (scale * loss).backward()
    assert vectors.grad is not None
    assert weight.grad is not None
    assert vectors.grad.dtype == weight.grad.dtype == dtype
    return [loss.detach(), vectors.grad.float() / scale, weight.grad.float() / scale]


@pytest.mark.parametrize("vocabulary", [2, 23, 301, 5000])  # from six rows at a time to all of them
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_it_is_the_usual_loss(dtype: torch.dtype, tolerance: float, vocabulary: int) -> None:
    for ours, usual in zip(
        loss_and_gradients(streamed_cross_entropy, dtype, vocabulary),
        loss_and_gradients(usual_loss, dtype, vocabulary),
        strict=True,
    ):
        assert (ours - usual).norm() <= tolerance * usual.norm()


def test_its_gradients_scale() -> None:
    whole, quarter = (
        loss_and_gradients(streamed_cross_entropy, torch.float32, VOCABULARY, scale) for scale in (1.0, 0.25)
    )
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(whole, quarter, strict=True))


def test_scores_too_large_for_exp_are_no_trouble() -> None:
    vectors, weight, targets = inputs()
    with torch.no_grad():
        weight *= 1e4
    found, usual = streamed_cross_entropy(vectors, weight, targets), usual_loss(vectors, weight, targets)
    assert torch.isfinite(found)
    assert found.item() == pytest.approx(usual.item(), rel=1e-5)


def test_a_vector_that_is_no_number_shows_in_the_loss() -> None:
    vectors, weight, targets = inputs()
    with torch.no_grad():
        vectors[1, 2, 3] = torch.nan
    assert torch.isnan(streamed_cross_entropy(vectors, weight, targets))


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that is made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return found


@pytest.mark.parametrize("trains", [True, False])
def test_all_scores_are_never_there_at_once(trains: bool) -> None:
    vectors, weight, targets = inputs(vocabulary=5000)
    with Largest() as largest, torch.set_grad_enabled(trains):
        loss = streamed_cross_entropy(vectors, weight, targets)
        if trains:
            loss.backward()
    scores_of_all = targets.numel() * len(weight)
    assert largest.numel <= weight.numel() < scores_of_all / 4
