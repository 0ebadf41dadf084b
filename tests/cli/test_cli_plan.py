"""`elastictrain plan` from outside."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from elastictrain.cli import app
from elastictrain.config import TrainConfig
from elastictrain.errors import ConfigError
from elastictrain.machines import read_cluster, this_machine

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "jobs/llm_tiny.yaml")
H100 = ROOT / "clusters/hardware/h100x8.yaml"
LARGE = [
    "train.dtype=bf16", "train.global_batch=256", "model.hidden_size=4096", "model.num_layers=32",
    "model.num_heads=32", "model.num_kv_heads=8", "data.vocab_size=32000", "data.seq_len=4096",
]  # fmt: skip


def planned(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["plan", RECIPE, *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_this_machine_is_measured_and_the_best_can_be_typed_in() -> None:
    told = json.loads(planned("--json"))
    assert told["cluster"]["name"] == "this machine"
    best = told["best"]
    config = TrainConfig.load(RECIPE, best["overrides"])
    layout = config.layout(config.elastic.max_workers)
    assert layout.to_json().items() <= best["layout"].items()
    assert best["memory"]["device_bytes"] <= told["cluster"]["device"]["memory_bytes"]
    assert sorted(told["world_sizes"]) == ["1", "2"]
    assert sorted(told["runs"]) == ["1", "2"]
    assert told["runs"]["2"]["layout"] == TrainConfig.load(RECIPE).layout(2).to_json()
    assert "nothing is known to be faster" in told["runs"]["2"]["why"]
    assert sum(told["parameters"].values()) == 2 * told["parameters"]["all"] == 2 * 912_160


def test_a_layout_that_may_be_as_fast_is_kept() -> None:
    arguments = ("--cluster", str(H100), "--workers", "2", "train.dtype=bf16", "elastic.max_workers=2")
    found = json.loads(planned("--json", *arguments))
    best, written = found["best"]["time"]["step_s"], found["as_written"]["time"]["step_s"]
    assert best < written < best * (1 + found["time_error"])
    assert found["advised"]["keep"]
    assert found["advised"]["layout"] == found["as_written"]["layout"]
    told = planned(*arguments)
    assert "keep     dp2 zero1 8x2, as the config has it: nothing is known to be faster (dp2 zero3 16x1: by " in told
    assert "slower, within the error: more" in told
    assert "best     " not in told
    assert "runs     dp1 zero1 8x4 with 1; dp2 zero1 8x2 with 2" in told

    slower = json.loads(planned("--json", *arguments, "train.activation_checkpointing=true"))
    assert not slower["advised"]["keep"]
    assert slower["advised"]["layout"] == slower["best"]["layout"]


def test_a_cluster_file_in_words() -> None:
    told = planned("--cluster", str(H100), *LARGE)
    assert "128 x H100 SXM 80 GB" in told
    assert "best     dp16 pp4 tp2 zero1 1x16: elastictrain train CONFIG parallel.layout=manual parallel.pp=4" in told
    assert "memory   weights" in told
    assert "slower, within the error: more" in told
    assert "too little memory with 1" in told


def test_a_cluster_with_more_devices_than_a_step_can_use() -> None:
    told = json.loads(planned("--json", "--cluster", str(H100), "train.global_batch=48"))
    assert told["best"]["layout"]["world_size"] == 48
    assert list(told["world_sizes"]) == ["1", "2", "3", "4", "6", "8", "12", "16", "24", "48"]


def test_what_fits_nowhere_is_refused_with_the_arithmetic() -> None:
    command = [sys.executable, "-m", "elastictrain", "plan", RECIPE, "--cluster", str(H100), "--workers", "1", *LARGE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no layout of 1 workers fits H100 SXM 80 GB with 85 GB: the leanest, dp1 zero" in done.stderr
    assert "GB a worker. Use more workers" in done.stderr
    assert "offload-cpu would fit: " in done.stderr
    assert " parallel.offload=cpu " in done.stderr


def test_planning_for_a_cluster_file_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from elastictrain.cli import app; "
        f"r = CliRunner().invoke(app, ['plan', {RECIPE!r}, '--cluster', {str(H100)!r}, '--workers', '2']); "
        "print(r.exit_code, sorted({'torch', 'ray', 'deepspeed', 'mlflow', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "0 []"


@pytest.mark.parametrize("path", sorted((ROOT / "clusters/hardware").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_cluster_files_are_read(path: Path) -> None:
    cluster = read_cluster(path)
    assert cluster.within_node.bytes_per_s > cluster.between_nodes.bytes_per_s
    assert cluster.link(cluster.devices_per_node) is cluster.within_node
    assert cluster.link(cluster.devices_per_node + 1) is cluster.between_nodes


def test_a_wrong_cluster_file_names_the_field(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(H100.read_text().replace("num_nodes: 16", "num_nodes: 0\nracks: 4"))
    with pytest.raises(ConfigError, match=r"wrong\.yaml: num_nodes: .*greater than or equal to 1.*; racks: Extra"):
        read_cluster(wrong)
    with pytest.raises(ConfigError, match="can't read the cluster file"):
        read_cluster(tmp_path / "none.yaml")


def test_workers_without_gpus_share_the_memory() -> None:
    one, two = this_machine(1), this_machine(2)
    assert two.devices_per_node >= 2
    if one.device.name.startswith("a CPU"):
        assert one.device.memory_bytes == pytest.approx(2 * two.device.memory_bytes, rel=0.2)
        assert two.device.flops["fp32"] > 1e8
