"""The language model as the engine sees it: built from a seed, trained by its loss, evaluated, sampled from."""

from __future__ import annotations

import inspect
import json.decoder
import math

import pytest
import torch
from torch import Tensor

from elastictrain.config import TrainConfig
from elastictrain.workloads import build_workload
from elastictrain.workloads.base import Workload

VOCAB = 300
SEQ_LEN = 32


def language_model(**model: object) -> Workload:
    shape = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, **model}
    return build_workload(TrainConfig.from_dict({"model": shape, "data": {"seq_len": SEQ_LEN}}), VOCAB)


def real_text() -> dict[str, Tensor]:
    """Bytes of a real Python module, as samples."""
    source = inspect.getsource(json.decoder).encode()[: 16 * (SEQ_LEN + 1)]
    return {"tokens": torch.tensor(list(source)).view(16, SEQ_LEN + 1)}


def test_the_same_seed_gives_the_same_bits() -> None:
    model = language_model()
    first, second, other = (model.build(seed).state_dict() for seed in (3, 3, 4))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])
    assert {(v.dtype, v.device.type) for v in first.values()} == {(torch.float32, "cpu")}


def test_building_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    language_model().build(0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("tied", [True, False])
def test_an_untrained_model_is_as_good_as_guessing(tied: bool) -> None:
    model = language_model(tie_embeddings=tied)
    assert model.loss(model.build(0), real_text()).item() == pytest.approx(math.log(VOCAB), abs=0.1)


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.1), (torch.bfloat16, 0.0)])
def test_it_learns_a_text(dtype: torch.dtype, dropout: float) -> None:
    model, batch = language_model(dropout=dropout), real_text()
    module = model.build(0).to(dtype)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss(module, batch)
        loss.backward()
        optimizer.step()
    assert loss.dtype == torch.float32
    nll, count = model.evaluate(module, batch)
    assert nll / count < 1.8 < math.log(VOCAB) / 3


def test_evaluation_is_the_summed_loss_without_dropout() -> None:
    model, batch = language_model(dropout=0.5), real_text()
    module = model.build(0)
    nll, count = model.evaluate(module, batch)
    assert module.training
    assert count == model.num_tokens(batch) == 16 * SEQ_LEN
    module.eval()
    assert nll / count == pytest.approx(model.loss(module, batch).item(), rel=1e-5)
    model.evaluate(module, batch)
    assert not module.training


def test_matrices_decay_and_norms_do_not() -> None:
    model = language_model()
    undecayed = {name for name, p in model.build(0).named_parameters() if not model.decays(name, p)}
    assert undecayed == {"norm.weight"} | {f"blocks.{i}.{n}_norm.weight" for i in (0, 1) for n in ("attention", "mlp")}


def test_a_sample_is_the_same_for_the_same_seed() -> None:
    model = language_model()
    module = model.build(0)
    before = torch.get_rng_state()
    long_prompt = list(range(3 * SEQ_LEN))
    samples = [model.generate(module, long_prompt, 40, seed) for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]
    assert [len(s) for s in samples] == [40, 40, 40]
    assert all(0 <= token < VOCAB for sample in samples for token in sample)
    assert torch.equal(torch.get_rng_state(), before)
    assert long_prompt == list(range(3 * SEQ_LEN))


def test_a_sample_sees_the_last_tokens_of_its_prompt_only() -> None:
    model = language_model()
    module = model.build(0)
    tail = list(range(SEQ_LEN))
    assert model.generate(module, [250, 251, *tail], 5, seed=0) == model.generate(module, tail, 5, seed=0)
