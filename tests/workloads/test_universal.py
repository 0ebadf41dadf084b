"""A checkpoint that DeepSpeed itself has written and converted is where a model and its optimizer go on; about 40 s."""

from __future__ import annotations

import json
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
from elastictrain.state.tensors import PARTS, LogicalTensor
from elastictrain.workloads import build_workload, starting_state
from elastictrain.workloads.base import Workload

transformers = pytest.importorskip("transformers")

TRAIN = """
import json, os, sys
import torch, deepspeed, transformers
from safetensors.torch import save_file

folder, stage = sys.argv[1], int(sys.argv[2])
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
torch.manual_seed(1)
module = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
config = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": stage},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
tokens = torch.arange(66).view(2, 33)

def step():
    scores = engine(input_ids=tokens[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())
    engine.backward(loss)
    engine.step()
    return loss.item()

for _ in range(3):
    step()
with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=stage == 3):
    save_file({name: p.detach().clone() for name, p in module.named_parameters()}, f"{folder}/expected")
engine.save_checkpoint(f"{folder}/trained", tag="step")
print("LOSSES", json.dumps([step() for _ in range(4)]))
"""

GO_ON = """
import json, sys
import torch
from elastictrain.config import TrainConfig
from elastictrain.engine.build import build_engine
from elastictrain.engine.group import RankGroup, Rendezvous
from elastictrain.workloads import build_workload, starting_state

config = TrainConfig.from_dict(json.loads(sys.argv[1]))
rendezvous = Rendezvous.serve("127.0.0.1")
group = RankGroup(rendezvous.address, 0, 0, 1)
group.form()
engine = build_engine(build_workload(config, 260), config, config.layout(1), group)
engine.import_state(starting_state(config, engine.tensors()))
assert engine.scalars() == {"optimizer_step": 3}
batch = {"tokens": torch.arange(66).view(2, 33)}
nothing = lambda *_: None
losses = [
    engine.train_step([(0, batch)], learning_rate=1e-2, before_update=nothing, on_phase=nothing).losses[0]
    for _ in range(4)
]
print("LOSSES", json.dumps(losses))
"""


def trained(folder: Path, stage: int) -> tuple[Path, list[float]]:
    """A tiny Llama after three steps under DeepSpeed, as a universal checkpoint, and the losses of the next four."""
    transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
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
    losses = run(["-c", TRAIN, str(folder), str(stage)])
    run(convert)
    (folder / "config.json").rename(folder / "universal" / "config.json")
    return folder / "universal", losses


def run(arguments: list[str]) -> list[float]:
    """What a Python process tells of its losses."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if line.startswith("LOSSES ")]
    return json.loads(told[0].removeprefix("LOSSES ")) if told else []


def workload(folder: Path) -> Workload:
    config = {"model": {"kind": "huggingface", "path": str(folder)}, "data": {"seq_len": 32}}
    return build_workload(TrainConfig.from_dict(config), 260)


@pytest.mark.parametrize("stage", [1, 3])
def test_training_goes_on_where_deepspeed_was(tmp_path: Path, stage: int) -> None:
    folder, losses = trained(tmp_path, stage)
    module = workload(folder).build(0)
    expected = load_file(tmp_path / "expected")
    found = dict(module.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    config = {
        "train": {"global_batch": 2, "micro_batch": 2, "weight_decay": 0.0, "grad_clip": 0.0},
        "model": {"kind": "huggingface", "path": str(folder)},
        "data": {"seq_len": 32},
        "parallel": {"layout": "manual", "zero_stage": 2},
        "elastic": {"max_workers": 1},
    }
    assert losses[-1] < losses[0] - 0.3
    assert run(["-c", GO_ON, json.dumps(config)]) == pytest.approx(losses, abs=1e-5)


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


def test_moments_that_are_no_whole_state_are_refused(by_hand: Path) -> None:
    module = workload(by_hand).build(0)
    tensors = [LogicalTensor(f"{part}/{name}", p.shape) for part in PARTS for name, p in module.named_parameters()]
    config = TrainConfig.from_dict({"model": {"kind": "huggingface", "path": str(by_hand)}, "data": {"seq_len": 32}})
    assert starting_state(config, tensors) is None
    torch.save(torch.zeros(32), by_hand / "zero/model.norm.weight/exp_avg.pt")
    with pytest.raises(ConfigError, match="is not there, and moments of other parameters are: copy all of"):
        starting_state(config, tensors)
    for name, parameter in module.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.save(torch.ones_like(parameter), by_hand / "zero" / name / f"{moment}.pt")
    with pytest.raises(ConfigError, match="of the updates that they come from it says none: it needs one"):
        starting_state(config, tensors)
    (by_hand / "zero/model.norm.weight/step.pt").write_bytes(pickle.dumps(Malice()))
    with pytest.raises(ConfigError, match="holds more than a weight, or is damaged"):
        starting_state(config, tensors)


def test_another_models_weights_are_refused(by_hand: Path) -> None:
    path = by_hand / "zero/model.norm.weight/fp32.pt"
    torch.save({"param": torch.zeros(16)}, path)
    with pytest.raises(ConfigError, match=r"holds \(16,\), and the model needs \(32,\)"):
        workload(by_hand).build(0)
    path.unlink()
    with pytest.raises(ConfigError, match="is not there: the checkpoint is of another model"):
        workload(by_hand).build(0)
