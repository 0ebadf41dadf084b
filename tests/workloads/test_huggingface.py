"""Models of `transformers` behind the same calls, from a local folder, with the network cut."""

from __future__ import annotations

import json
import math
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from elastictrain.config import TrainConfig
from elastictrain.errors import ConfigError
from elastictrain.plan.layout import Recompute
from elastictrain.plan.space import RECOMPUTES
from elastictrain.workloads import build_workload
from elastictrain.workloads.base import Workload

transformers = pytest.importorskip("transformers")

VOCAB = 260
SEQ_LEN = 32


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"the network was touched: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attention_dropout=0.1,
    ).save_pretrained(tmp_path)
    return tmp_path


def workload(folder: Path, vocab_size: int = VOCAB, seq_len: int = SEQ_LEN, recompute: Recompute = "none") -> Workload:
    config = {
        "model": {"kind": "huggingface", "path": str(folder)},
        "data": {"seq_len": seq_len},
        "train": {"activation_checkpointing": recompute},
    }
    return build_workload(TrainConfig.from_dict(config), vocab_size)


def batch() -> dict[str, Tensor]:
    text = (Path(__file__).read_bytes())[: 8 * (SEQ_LEN + 1)]
    return {"tokens": torch.tensor(list(text)).view(8, SEQ_LEN + 1)}


@pytest.mark.parametrize("kind", ["LlamaConfig", "GPT2Config", "GPTNeoXConfig"])
def test_an_outline_is_the_model_but_for_what_its_weights_hold(tmp_path: Path, kind: str) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    getattr(transformers, kind)(**sizes, max_position_embeddings=64, tie_word_embeddings=True).save_pretrained(tmp_path)
    model = workload(tmp_path)
    model.build(3).save_pretrained(tmp_path)  # type: ignore[operator]  # transformers'
    whole, outline = workload(tmp_path).build(3), workload(tmp_path).outline()
    assert [(n, p.shape) for n, p in whole.named_parameters()] == [(n, p.shape) for n, p in outline.named_parameters()]
    assert not all(torch.equal(p, q) for p, q in zip(whole.parameters(), outline.parameters(), strict=True))
    with torch.no_grad():
        for p, q in zip(outline.parameters(), whole.parameters(), strict=True):
            p.copy_(q)
    buffers = dict(whole.named_buffers())
    assert all(torch.equal(buffers.pop(name), buffer) for name, buffer in outline.named_buffers())
    assert not buffers
    assert model.loss(outline.eval(), batch()).item() == model.loss(whole.eval(), batch()).item()


def test_a_llama_trains_through_the_same_calls(llama: Path) -> None:
    model = workload(llama)
    module = model.build(0)
    assert module.training
    assert model.loss(module, batch()).item() == pytest.approx(math.log(300), abs=0.2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model.loss(module, batch()).backward()
        optimizer.step()
    nll, count = model.evaluate(module, batch())
    assert count == model.num_tokens(batch()) == 8 * SEQ_LEN
    assert nll / count < math.log(300) / 2
    sample = model.generate(module, [100, 101], 20, seed=1)
    assert sample == model.generate(module, [100, 101], 20, seed=1)
    assert all(0 <= token < VOCAB for token in sample)
    assert not any(model.decays(name, p) for name, p in module.named_parameters() if "norm" in name)


def test_sampling_keeps_to_the_tokenizers_ids(llama: Path) -> None:
    model = workload(llama, vocab_size=3)
    assert set(model.generate(model.build(0), [0], 50, seed=1)) == {0, 1, 2}


def test_new_weights_come_from_the_seed_alone(llama: Path) -> None:
    model = workload(llama)
    before = torch.get_rng_state()
    first = model.build(3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    second, other = model.build(3).state_dict(), model.build(4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_weights_in_the_folder_are_the_start(llama: Path) -> None:
    source = workload(llama).build(7)
    source.save_pretrained(llama)
    module = workload(llama).build(0)
    assert module.training
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), module.parameters(), strict=True))


def usual_loss(model: Workload, module: torch.nn.Module, tokens: Tensor) -> Tensor:
    logits = model.logits(module, tokens[:, :-1])  # type: ignore[attr-defined]  # a language model's
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


SIZES = {
    "vocab_size": 300, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "more", "streams"),
    [
        ("Llama", {}, True),
        ("Mixtral", {"num_local_experts": 2, "num_key_value_heads": 2}, True),
        ("GPT2", {"n_embd": 32, "n_head": 4, "n_layer": 2}, True),
        ("GPTNeoX", {}, True),
        ("Granite", {"logits_scaling": 4.0}, False),
        ("Cohere", {"logit_scale": 0.5}, False),
        ("Gemma3Text", {"head_dim": 8}, True),
        ("Gemma3Text", {"head_dim": 8, "final_logit_softcapping": 5.0}, False),
        ("Phi", {}, False),  # its head has a bias
    ],
)
def test_the_loss_is_the_usual_one_whether_it_can_be_streamed_or_not(
    kind: str, more: dict[str, object], streams: bool, tmp_path: Path
) -> None:
    getattr(transformers, f"{kind}Config")(**(SIZES | more)).save_pretrained(tmp_path)
    model = workload(tmp_path)
    assert model.streams_loss is streams  # type: ignore[attr-defined]  # a model of transformers
    module, tokens, gradients = model.build(0), batch()["tokens"], []
    for way in (lambda: model.loss(module, batch()), lambda: usual_loss(model, module, tokens)):
        torch.manual_seed(5)
        loss = way()
        gradients.append([loss, *torch.autograd.grad(loss, list(module.parameters()), materialize_grads=True)])
    assert all((a - b).norm() <= 1e-5 * b.norm() + 1e-9 for a, b in zip(*gradients, strict=True))
    nll, count = model.evaluate(module, batch())
    module.eval()
    assert nll / count == pytest.approx(usual_loss(model, module, tokens).item(), rel=1e-5)


def test_recomputing_activations_gives_the_same_gradients_bit_for_bit(llama: Path) -> None:
    gradients = []
    for recompute in RECOMPUTES:
        model = workload(llama, recompute=recompute)
        module = model.build(0)
        torch.manual_seed(5)
        model.loss(module, batch()).backward()
        gradients.append([p.grad for p in module.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))


def test_rotary_frequencies_stay_exact_in_bf16(llama: Path) -> None:
    model = workload(llama)
    module = model.build(0)
    exact = module.get_buffer("model.rotary_emb.inv_freq").clone()
    assert model.loss(module.bfloat16(), batch()).dtype == torch.float32
    assert torch.equal(module.get_buffer("model.rotary_emb.inv_freq"), exact)


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size 300 .*tokenizer's 2048"):
        workload(llama, vocab_size=2048)


def test_samples_longer_than_the_model_takes_are_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"seq_len 128 exceeds the max_position_embeddings 64"):
        workload(llama, seq_len=128)


def test_pickled_weights_are_refused(llama: Path) -> None:
    (llama / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ConfigError, match="pickle"):
        workload(llama)


def test_damaged_weights_are_refused(llama: Path) -> None:
    (llama / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigError, match="can't load its weights"):
        workload(llama).build(0)


def test_code_in_the_folder_does_not_run(llama: Path) -> None:
    settings = json.loads((llama / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (llama / "config.json").write_text(json.dumps(settings))
    (llama / "mine.py").write_text(f"open({str(llama / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError, match=r"can't use its config\.json"):
        workload(llama)
    assert not (llama / "ran").exists()


def test_a_model_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    transformers.T5Config(vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="a t5"):
        workload(tmp_path)


@pytest.mark.parametrize("path", ["meta-llama/Llama-3.2-1B", "nowhere"])
def test_a_path_that_is_no_model_folder_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        workload(Path(path))


def test_without_the_package_the_error_says_what_to_install(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "elastictrain.workloads.huggingface", raising=False)
    with pytest.raises(ConfigError, match=r"pip install elastictrain\[hf\]"):
        workload(llama)
