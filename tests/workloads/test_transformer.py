"""The transformer's mathematics: causal, rotary, grouped, and the same whatever computes it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from elastictrain.config import ModelSection
from elastictrain.plan.layout import Recompute
from elastictrain.plan.space import RECOMPUTES
from elastictrain.workloads.transformer import Transformer, initialise, rotary_table, rotate

VOCAB = 300


def transformer(*, recompute: Recompute = "none", seed: int = 0, **model: object) -> Transformer:
    shape = ModelSection.model_validate({"num_layers": 2, "hidden_size": 32, "num_heads": 4, **model})
    module = Transformer(shape, VOCAB, recompute)
    initialise(module, seed, shape.num_layers, {name: tuple(p.shape) for name, p in module.named_parameters()})
    return module


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_later_token_does_not_change_earlier_logits(kv_heads: int) -> None:
    module, before = transformer(num_kv_heads=kv_heads), tokens(2, 16)
    after = before.clone()
    after[:, 10] = (after[:, 10] + 1) % VOCAB
    torch.testing.assert_close(module(after)[:, :10], module(before)[:, :10])
    assert not torch.allclose(module(after)[:, 10:], module(before)[:, 10:])


def test_grouped_heads_are_shared_heads() -> None:
    grouped, full = transformer(num_kv_heads=2), transformer(num_kv_heads=4)
    weights = grouped.state_dict()
    for name in weights:
        if name.endswith(("key.weight", "value.weight")):
            heads = weights[name].unflatten(0, (2, 8))
            weights[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    torch.testing.assert_close(grouped(tokens(2, 16)), full(tokens(2, 16)))


@pytest.mark.parametrize(("query_at", "key_at", "shift"), [(5, 2, 1), (9, 9, 40), (30, 0, 90)])
def test_rotation_makes_scores_depend_on_distance_only(query_at: int, key_at: int, shift: int) -> None:
    table = rotary_table(128, 16, 10_000.0, torch.device("cpu"))
    query, key = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))

    def score(i: int, j: int) -> Tensor:
        return rotate(query.expand(1, 1, 128, 16), table)[0, 0, i] @ rotate(key.expand(1, 1, 128, 16), table)[0, 0, j]

    torch.testing.assert_close(score(query_at, key_at), score(query_at + shift, key_at + shift))
    assert not torch.isclose(score(query_at, key_at), score(query_at + shift, key_at))


def test_rotation_is_exact_in_bf16_at_far_positions() -> None:
    cos, _ = rotary_table(8192, 64, 10_000.0, torch.device("cpu"))
    frequency = 10_000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    torch.testing.assert_close(cos[8000].double(), (8000 * frequency).cos(), atol=2e-3, rtol=0)
    ones = torch.ones(1, 1, 8192, 64)
    table = rotary_table(8192, 64, 10_000.0, torch.device("cpu"))
    torch.testing.assert_close(rotate(ones.bfloat16(), table), rotate(ones, table).bfloat16(), atol=0, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_bf16_weights_give_nearly_the_same_logits(tied: bool) -> None:
    module = transformer(tie_embeddings=tied)
    exact = module(tokens(2, 32))
    rounded = module.bfloat16()(tokens(2, 32))
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize(("tied", "num_experts"), [(True, None), (False, None), (False, 4)])
def test_recomputing_activations_gives_the_same_gradients_bit_for_bit(tied: bool, num_experts: int | None) -> None:
    gradients = []
    for recompute in RECOMPUTES:
        module = transformer(dropout=0.2, tie_embeddings=tied, recompute=recompute, num_experts=num_experts)
        torch.manual_seed(5)
        loss, *_ = module(tokens(2, 16), tokens(2, 16)) if num_experts else (module(tokens(2, 16), tokens(2, 16)),)
        loss.backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert all(torch.equal(gradient, others[name]) for others in gradients[1:]), name


def test_recomputing_activations_saves_memory() -> None:
    def saved_bytes(recompute: Recompute) -> int:
        total = 0

        def count(saved: Tensor) -> Tensor:
            nonlocal total
            total += saved.nbytes
            return saved

        module = transformer(num_layers=6, recompute=recompute)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
            module(tokens(2, 16))
        return total

    assert saved_bytes("full") < saved_bytes("none") / 2


def test_dropout_follows_the_global_seed_and_stops_in_evaluation() -> None:
    module = transformer(dropout=0.5)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(module(tokens(1, 16)))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    module.eval()
    assert torch.equal(module(tokens(1, 16)), module(tokens(1, 16)))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_used_inside_their_own_module_only(tied: bool) -> None:
    """As under ZeRO-3: a module's own weights exist during its forward pass and at no other time."""
    module = transformer(tie_embeddings=tied)
    with torch.no_grad():
        expected = module(tokens(2, 16))
        for owner in module.modules():
            _gather_around_forward(owner)
        assert torch.equal(module(tokens(2, 16)), expected)
        assert all(p.numel() == 0 for p in module.parameters())


def _gather_around_forward(owner: nn.Module) -> None:
    full = {p: p.data for p in owner.parameters(recurse=False)}

    def gather(*_: object) -> None:
        for parameter, value in full.items():
            parameter.data = value

    def release(*_: object) -> None:
        for parameter in full:
            parameter.data = torch.empty(0)

    owner.register_forward_pre_hook(gather)
    owner.register_forward_hook(release)
    release()


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    shallow, deep, other = transformer(), transformer(num_layers=5, tie_embeddings=False), transformer(seed=1)
    for name, parameter in shallow.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        # what adds to the residual stream is scaled by the depth, everything else is bit-identical
        if name.endswith(("output.weight", "down.weight")):
            torch.testing.assert_close(parameter, deep.get_parameter(name) * math.sqrt(5 / 2))
        else:
            assert torch.equal(parameter, deep.get_parameter(name)), name
        assert not torch.equal(parameter, other.get_parameter(name)), name
    weights = [p for p in shallow.parameters() if p.ndim > 1 and p.shape == (32, 32)]
    assert len({tuple(w.flatten()[:4].tolist()) for w in weights}) == len(weights)
    assert shallow.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
