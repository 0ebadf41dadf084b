"""Gating as a pure function, and the layer against a loop over tokens that is easy to believe."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from elastictrain.config import ModelSection, TrainConfig
from elastictrain.workloads.experts import MixtureOfExperts, Router, route
from elastictrain.workloads.language_model import LanguageModel


@st.composite
def gatings(draw: st.DrawFn) -> tuple[Tensor, int, float]:
    """Probabilities, choices a token, capacity factor."""
    num_tokens, num_experts = draw(st.integers(1, 40)), draw(st.integers(2, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # some experts are liked more than others, by all tokens
    liked = draw(st.floats(0, 9)) * torch.randn(num_experts, generator=generator)
    scores = torch.randn(num_tokens, num_experts, generator=generator) + liked
    factor = draw(st.sampled_from([0.1, 0.5, 1.0, 1.25, 2.0, 100.0]))
    return scores.softmax(-1), draw(st.integers(1, 2)), factor


@settings(deadline=None)
@given(gatings())
def test_gating_keeps_its_promises(gating: tuple[Tensor, int, float]) -> None:
    probabilities, num_choices, factor = gating
    num_tokens, num_experts = probabilities.shape
    routing = route(probabilities, num_choices, factor)
    assert routing.capacity == min(num_tokens, math.ceil(factor * num_choices * num_tokens / num_experts))
    nowhere = num_experts * routing.capacity
    taken = routing.slots[routing.slots < nowhere]
    assert taken.unique().numel() == taken.numel(), "no place is given twice"
    assert int(routing.slots.min()) >= 0
    assert int(routing.slots.max()) <= nowhere
    experts = routing.slots // routing.capacity
    if num_choices == 2:
        both = (routing.slots < nowhere).all(0)
        assert (experts[0] != experts[1])[both].all(), "two choices are two experts"
        assert routing.weights.sum(0).allclose(torch.ones(num_tokens))
    else:
        assert routing.weights.equal(probabilities.amax(-1).unsqueeze(0))
    assert (routing.weights > 0).all()
    assert (routing.weights.sum(0) <= 1 + 1e-6).all()
    balance, busiest, dropped = routing.told.tolist()
    assert 0 < balance <= num_experts + 1e-4
    assert 1 - 1e-6 <= busiest <= num_experts / num_choices + 1e-6
    assert dropped == pytest.approx(1 - taken.numel() / routing.slots.numel(), abs=1e-6)
    if factor >= num_experts:
        assert dropped == 0


@settings(deadline=None)
@given(gatings())
def test_who_finds_no_room_came_later(gating: tuple[Tensor, int, float]) -> None:
    """All first choices come before all second ones, and within them the earlier token."""
    probabilities, num_choices, factor = gating
    routing = route(probabilities, num_choices, factor)
    chosen = probabilities.topk(num_choices, dim=-1).indices.T
    nowhere = probabilities.shape[1] * routing.capacity
    room = [routing.capacity] * probabilities.shape[1]
    for slots, experts in zip(routing.slots.tolist(), chosen.tolist(), strict=True):
        for slot, expert in zip(slots, experts, strict=True):
            assert (slot < nowhere) == (room[expert] > 0)
            if room[expert]:
                assert slot == expert * routing.capacity + routing.capacity - room[expert]
                room[expert] -= 1


def test_even_experts_cost_no_more_than_one() -> None:
    even = torch.eye(4).repeat(3, 1)
    assert route(even, 1, 1.0).told.tolist() == [1.0, 1.0, 0.0]
    one = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(12, 1)
    assert route(one, 1, 1.0).told.tolist() == [4.0, 4.0, 0.75]


def naive(layer: MixtureOfExperts, tokens: Tensor, num_choices: int, factor: float) -> Tensor:
    """Token by token, as the papers say it."""
    probabilities = F.linear(tokens, layer.router.weight).softmax(-1)
    capacity = math.ceil(factor * num_choices * len(tokens) / layer.num_experts)
    room = [capacity] * layer.num_experts
    ranked = [row.argsort(descending=True).tolist() for row in probabilities]
    rows = [torch.zeros_like(token) for token in tokens]
    for choice in range(num_choices):
        for t, token in enumerate(tokens):
            expert = ranked[t][choice]
            if room[expert]:
                room[expert] -= 1
                p = probabilities[t, expert]
                weight = (
                    p if num_choices == 1 else p / (probabilities[t, ranked[t][0]] + probabilities[t, ranked[t][1]])
                )
                rows[t] = rows[t] + weight * layer.experts[str(expert)](token)
    return torch.stack(rows)


@pytest.mark.parametrize("num_choices", [1, 2])
@pytest.mark.parametrize("factor", [0.6, 1.25, 4.0])
def test_the_layer_is_the_loop(num_choices: int, factor: float) -> None:
    torch.manual_seed(0)
    model = ModelSection(num_experts=4, experts_per_token=num_choices, capacity_factor=factor)
    experts = {number: nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 8)) for number in range(4)}
    router = Router(8, 4)
    nn.init.normal_(router.weight)
    layer = MixtureOfExperts(router, experts, model)
    hidden = torch.randn(3, 7, 8, requires_grad=True)
    given_out, told = layer(hidden)
    expected = naive(layer, hidden.flatten(0, 1), num_choices, factor).view_as(hidden)
    torch.testing.assert_close(given_out, expected)
    assert (told[2] > 0) == (factor < 1), "the case drops tokens"
    probe = torch.randn_like(hidden)
    inputs = [hidden, *layer.parameters()]
    ours = torch.autograd.grad((given_out * probe).sum(), inputs)
    theirs = torch.autograd.grad((expected * probe).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        layer.eval()
        torch.testing.assert_close(layer(hidden)[0].flatten(0, 1), naive(layer, hidden.flatten(0, 1), num_choices, 99))


def language_model(**model: object) -> LanguageModel:
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "num_experts": 4}
    return LanguageModel(TrainConfig.from_dict({"model": sizes | model, "data": {"seq_len": 16}}), 301)


def test_the_loss_that_is_told_is_the_language_models_alone() -> None:
    batch = {"tokens": torch.randint(301, (2, 17), generator=torch.Generator().manual_seed(1))}
    told, gradients = [], []
    for weight in (0.0, 0.5):
        model = language_model(load_balance=weight)
        module = model.build(3)
        loss = model.loss(module, batch)
        loss.backward()
        told.append(loss.item())
        gradients.append(module.get_submodule("blocks.0.mlp.router").weight.grad)
    assert told[0] == told[1]
    assert not torch.allclose(*gradients)


def test_gauges_are_means_since_the_last_call() -> None:
    model = language_model(capacity_factor=0.5)
    module = model.build(3)
    assert model.take_gauges() == {}
    seen = []
    for seed in (1, 2):
        batch = {"tokens": torch.randint(301, (2, 17), generator=torch.Generator().manual_seed(seed))}
        model.loss(module, batch)
        seen.append(model.take_gauges())
    for seed in (1, 2):
        batch = {"tokens": torch.randint(301, (2, 17), generator=torch.Generator().manual_seed(seed))}
        model.loss(module, batch)
    both = model.take_gauges()
    assert both.keys() == {"busiest_expert", "dropped_tokens"}
    for name, value in both.items():
        assert value == pytest.approx((seen[0][name] + seen[1][name]) / 2)
    assert both["busiest_expert"] >= 1
    assert 0.5 <= both["dropped_tokens"] < 1


def test_experts_are_drawn_each_for_itself() -> None:
    few, more = (dict(language_model(num_experts=n).build(3).named_parameters()) for n in (4, 6))
    weights = {name: p for name, p in few.items() if ".experts." in name}
    assert len(weights) == 2 * 4 * 3
    assert all(torch.equal(p, more[name]) for name, p in weights.items())
    assert not torch.equal(few["blocks.0.mlp.experts.0.up.weight"], few["blocks.0.mlp.experts.1.up.weight"])
