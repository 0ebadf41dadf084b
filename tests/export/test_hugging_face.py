"""What is exported is the model: `transformers` gives its logits, and the tokenizer its ids."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from elastictrain.checkpoint.store import CheckpointStore, StoredCheckpoint
from elastictrain.config import TrainConfig
from elastictrain.data.tokenizer import Tokenizer
from elastictrain.errors import CheckpointError, ConfigError
from elastictrain.export.hugging_face import FILE_BYTES, Exported, export
from elastictrain.state.manifest import Manifest
from elastictrain.state.tensors import Fragment, LogicalTensor, ShardIndex
from elastictrain.storage import Storage
from elastictrain.workloads import build_workload

transformers = pytest.importorskip("transformers")

SEQ_LEN = 48
TEXT = Path(__file__).read_text()
TOKENIZER = Tokenizer.train([TEXT], 400)
SHAPE = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2}


def config_of(folder: Path, **model: object) -> TrainConfig:
    data = {"run": {"name": "demo", "storage": str(folder)}, "model": SHAPE | model, "data": {"seq_len": SEQ_LEN}}
    return TrainConfig.from_dict(data)


def trained(config: TrainConfig) -> nn.Module:
    """A model whose norms and biases are no ones and zeros any more."""
    module = build_workload(config, TOKENIZER.vocab_size).build(3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def saved(config: TrainConfig, module: nn.Module, step: int = 7) -> tuple[CheckpointStore, StoredCheckpoint]:
    """Its checkpoint, in two shards, moments and all."""
    store = CheckpointStore(Storage.open(config.run.storage).run(config.run.name))
    named = [(f"{part}/{n}", p) for n, p in module.named_parameters() for part in ("param", "exp_avg")]
    shards = []
    for rank in range(2):
        mine = named[rank::2]
        index = ShardIndex(tuple(Fragment(name, 0, p.numel()) for name, p in mine))
        content = b"".join(p.detach().numpy().tobytes() for _, p in mine)
        shards.append(store.write_shard(step, rank, 2, index, content))
    tensors = tuple(LogicalTensor(name, tuple(p.shape)) for name, p in named)
    manifest = Manifest("demo", step, step * 4, "0" * 64, 1.0, {"dp": 2}, {}, tensors, tuple(shards), 1e9)
    return store, store.commit(manifest)


def exported(config: TrainConfig, module: nn.Module, to: Path, file_bytes: int = FILE_BYTES) -> Exported:
    return export(config, *saved(config, module), TOKENIZER, to, file_bytes)


def logits(module: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = module(tokens)
    return out if isinstance(out, torch.Tensor) else out[0] if isinstance(out, tuple) else out.logits


@pytest.mark.parametrize(
    "model",
    [
        {"tie_embeddings": True},
        {"tie_embeddings": False, "dropout": 0.3, "rope_theta": 500.0, "norm_eps": 1e-3},
        {"num_kv_heads": 4, "intermediate_size": 100},
        {"num_experts": 4, "intermediate_size": 48, "capacity_factor": 0.5},
        {"rope_scaling": {"factor": 8, "low_turns": 1, "high_turns": 4, "trained_positions": 16}, "max_positions": 96},
    ],
    ids=["tied", "untied", "own-width", "experts", "stretched"],
)
def test_transformers_gives_the_same_logits(tmp_path: Path, model: dict[str, object]) -> None:
    config = config_of(tmp_path / "runs", **model)
    module = trained(config)
    done = exported(config, module, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    assert type(theirs).__name__ == ("MixtralForCausalLM" if config.model.num_experts else "LlamaForCausalLM")
    assert done.num_parameters == sum(p.numel() for p in theirs.parameters())
    tokens = torch.randint(0, TOKENIZER.vocab_size, (3, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    ours = logits(module, tokens)
    assert ours.std() > 0.3
    torch.testing.assert_close(logits(theirs, tokens), ours, rtol=0, atol=1e-5)


def test_one_expert_a_token_is_no_mixtral(tmp_path: Path) -> None:
    config = config_of(tmp_path / "runs", num_experts=4, experts_per_token=1)
    with pytest.raises(ConfigError, match="experts_per_token 2 for a Mixtral"):
        exported(config, trained(config), tmp_path / "out")


def test_its_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    config = config_of(tmp_path / "runs")
    exported(config, trained(config), tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert theirs.encode(TEXT, add_special_tokens=False) == TOKENIZER.encode(TEXT)
    assert theirs.decode(TOKENIZER.encode(TEXT)) == TEXT
    assert (theirs.eos_token, theirs.eos_token_id) == (TOKENIZER.end_of_text, TOKENIZER.end_of_text_id)
    assert Tokenizer.load(tmp_path / "out" / "tokenizer.json").sha256() == TOKENIZER.sha256()


def test_a_large_model_is_cut_into_files(tmp_path: Path) -> None:
    config = config_of(tmp_path / "runs")
    module = trained(config)
    done = exported(config, module, tmp_path / "out", file_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    assert done.num_bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    tokens = torch.arange(SEQ_LEN)[None]
    torch.testing.assert_close(logits(theirs, tokens), logits(module, tokens), rtol=0, atol=1e-5)


def test_what_is_exported_can_be_trained_on(tmp_path: Path) -> None:
    """Bit for bit: export, start a run from that folder, export that run."""
    config = config_of(tmp_path / "runs")
    exported(config, trained(config), tmp_path / "first")
    about = tmp_path / "first" / "tokenizer_config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "chat_template": "{{ messages }}"}))
    again = config_of(tmp_path / "more", kind="huggingface", path=str(tmp_path / "first"))
    module = build_workload(again, TOKENIZER.vocab_size).build(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.25
    exported(again, module, tmp_path / "second")
    first, second = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, local_files_only=True).state_dict()
        for name in ("first", "second")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name] + 0.25, second[name]) for name in first)
    assert Tokenizer.load(tmp_path / "second" / "tokenizer.json").sha256() == TOKENIZER.sha256()
    told = [json.loads((tmp_path / name / "tokenizer_config.json").read_text()) for name in ("first", "second")]
    assert told[1] == told[0] == {**told[0], "chat_template": "{{ messages }}"}, (
        "what came with the model stays with it"
    )


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    config = config_of(tmp_path / "runs")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        exported(config, trained(config), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_others_may_read_it_as_the_umask_says(tmp_path: Path) -> None:
    config = config_of(tmp_path / "runs")
    before = os.umask(0o027)
    try:
        exported(config, trained(config), tmp_path / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()} == {0o640}


def test_half_a_folder_is_never_there(tmp_path: Path) -> None:
    config = config_of(tmp_path / "runs")
    store, stored = saved(config, trained(config))
    for shard in (tmp_path / "runs").rglob("*.safetensors"):
        shard.write_bytes(b"")
    with pytest.raises(Exception, match="can't be read"):
        export(config, store, stored, TOKENIZER, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    """transformers would fill what is missing with random numbers, and say so in a log."""
    config = config_of(tmp_path / "runs")
    store, stored = saved(config, trained(config))
    for other in ({"num_layers": 3}, {"num_layers": 1}, {"tie_embeddings": False}):
        with pytest.raises(CheckpointError, match="not of the model that config"):
            export(config_of(tmp_path / "runs", **other), store, stored, TOKENIZER, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_in_it_is_pickled(tmp_path: Path) -> None:
    config = config_of(tmp_path / "runs")
    exported(config, trained(config), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
