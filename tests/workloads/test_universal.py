"""A checkpoint that DeepSpeed itself has written and converted is where a model starts from; about 25 s."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from elastictrain.config import TrainConfig
from elastictrain.errors import ConfigError
from elastictrain.workloads import build_workload
from elastictrain.workloads.base import Workload

transformers = pytest.importorskip("transformers")

TRAIN_A_STEP = """
import os, sys
import torch, deepspeed, transformers
from safetensors.torch import save_file

folder, stage = sys.argv[1], int(sys.argv[2])
deepspeed.comm.torch.build_shm_op = lambda: None
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
torch.manual_seed(1)
module = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
config = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": stage},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
tokens = torch.arange(64).view(2, 32)
engine.backward(engine(input_ids=tokens, labels=tokens).loss)
engine.step()
with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=stage == 3):
    save_file({name: p.detach().clone() for name, p in module.named_parameters()}, f"{folder}/expected")
engine.save_checkpoint(f"{folder}/trained", tag="step")
"""


def trained(folder: Path, stage: int) -> Path:
    """A tiny Llama after one step under DeepSpeed, as a universal checkpoint."""
    transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    convert = [
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--inject_missing_state",
        "--num_extract_workers",
        "1",
        "--num_merge_workers",
        "1",
    ]
    convert += ["--input_folder", str(folder / "trained/step"), "--output_folder", str(folder / "universal")]
    for arguments in (["-c", TRAIN_A_STEP, str(folder), str(stage)], convert):
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    (folder / "config.json").rename(folder / "universal" / "config.json")
    return folder / "universal"


def workload(folder: Path) -> Workload:
    config = {"model": {"kind": "huggingface", "path": str(folder)}, "data": {"seq_len": 32}}
    return build_workload(TrainConfig.from_dict(config), 260)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_weights_are_those_that_deepspeed_had(tmp_path: Path, stage: int) -> None:
    module = workload(trained(tmp_path, stage)).build(0)
    expected = load_file(tmp_path / "expected")
    found = dict(module.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Malice:
    def __reduce__(self) -> object:
        return os.system, (f"touch {Malice.mark}",)

    mark = ""


@pytest.fixture
def by_hand(tmp_path: Path) -> Path:
    """A universal checkpoint of the same model, written without DeepSpeed."""
    folder = tmp_path / "model"
    settings = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    settings.save_pretrained(folder)
    for name, parameter in transformers.AutoModelForCausalLM.from_config(settings).named_parameters():
        (folder / "zero" / name).mkdir(parents=True)
        torch.save({"param": parameter.detach(), "cat_dim": 0}, folder / "zero" / name / "fp32.pt")
    return folder


def test_a_pickle_that_does_more_is_refused_and_does_nothing(by_hand: Path) -> None:
    Malice.mark = str(by_hand / "ran")
    torch.save({"param": torch.zeros(32), "more": Malice()}, by_hand / "zero/model.norm.weight/fp32.pt")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight.fp32\.pt holds more than a weight"):
        workload(by_hand).build(0)
    (by_hand / "zero/model.norm.weight/fp32.pt").write_bytes(pickle.dumps(Malice()))
    with pytest.raises(ConfigError, match="holds more than a weight, or is damaged"):
        workload(by_hand).build(0)
    assert not Path(Malice.mark).exists()


def test_another_models_weights_are_refused(by_hand: Path) -> None:
    path = by_hand / "zero/model.norm.weight/fp32.pt"
    torch.save({"param": torch.zeros(16)}, path)
    with pytest.raises(ConfigError, match=r"holds \(16,\), and the model needs \(32,\)"):
        workload(by_hand).build(0)
    path.unlink()
    with pytest.raises(ConfigError, match="is not there: the checkpoint is of another model"):
        workload(by_hand).build(0)
