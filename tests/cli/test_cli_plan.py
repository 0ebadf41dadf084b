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


ALL = ("elastic.max_workers=128", "train.micro_batch=1")


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
    assert "best     dp1 pp16 sp8 zero1 1x256: elastictrain train CONFIG parallel.layout=manual parallel.pp=16" in told
    assert "memory   weights" in told
    assert "slower, within the error: more" in told
    assert "too little memory with 1" in planned("--cluster", str(H100), *LARGE, "model.hidden_size=16384")


def test_a_cluster_with_more_devices_than_a_step_can_use() -> None:
    told = json.loads(planned("--json", "--cluster", str(H100), "train.global_batch=48"))
    assert told["best"]["layout"]["world_size"] == 48
    assert list(told["world_sizes"]) == ["1", "2", "3", "4", "6", "8", "12", "16", "24", "48"]


def test_numbers_of_workers_are_those_that_the_run_can_have() -> None:
    told = json.loads(planned("--json", "--cluster", str(H100), *LARGE, *ALL, "elastic.min_workers=96"))
    assert told["runs"].keys() == told["world_sizes"].keys() == {"96", "128"}
    split = ("parallel.layout=manual", "parallel.pp=2", "elastic.min_workers=2", "elastic.max_workers=4")
    assert json.loads(planned("--json", *split))["world_sizes"].keys() == {"2", "4"}
    assert CliRunner().invoke(app, ["plan", RECIPE, "--workers", "-1"]).exit_code == 2
    too_many = CliRunner().invoke(app, ["plan", RECIPE, "--cluster", str(H100), "--workers", "4096"])
    assert too_many.exit_code == 2
    assert "h100x8.yaml has 128 devices" in too_many.output


def test_experts_are_shared_out_without_a_word_where_that_is_faster() -> None:
    experts = ("model.num_experts=8", "model.intermediate_size=14336", "elastic.max_workers=32", "train.micro_batch=4")
    experts = (*experts, "parallel.pp=1", "parallel.tp=1")
    arguments = ("--cluster", str(H100), "--workers", "32", *LARGE, *experts)
    found = json.loads(planned("--json", *arguments))
    best = found["best"]
    assert best["layout"] == found["best_to_ask_for"]["layout"]
    assert best["layout"]["ep"] > 1
    assert found["runs"]["32"]["layout"]["ep"] > 1, "of what the config leaves open"
    assert TrainConfig.load(RECIPE, [*LARGE, *experts, *best["overrides"]]).layout(32).ep == best["layout"]["ep"]
    assert "has to be asked for" not in planned(*arguments)


def test_fp16_is_planned_as_its_engines_run_it() -> None:
    found = json.loads(planned("--json", "--cluster", str(H100), *LARGE, *ALL, "train.dtype=fp16"))
    layouts = [found["best"]["layout"], *(choice["layout"] for choice in found["runs"].values())]
    assert all(layout.get("pp", 1) * layout.get("tp", 1) == 1 <= layout["zero_stage"] for layout in layouts)


def test_what_fits_nowhere_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    small_hosts = tmp_path / "small-hosts.yaml"
    small_hosts.write_text(H100.read_text().replace("host_memory_bytes: 2_000_000", "host_memory_bytes: 200_000"))
    arguments = ["plan", RECIPE, "--cluster", str(small_hosts), "--workers", "1", *LARGE]
    command = [sys.executable, "-m", "elastictrain", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no layout of 1 workers fits H100 SXM 80 GB with 85 GB: the leanest, dp1 zero" in done.stderr
    assert "GB a worker; offload needs hosts with more than 200 GB. Use more workers" in done.stderr
    assert "offload-nvme would fit: " in done.stderr
    assert " parallel.offload=nvme " in done.stderr


def test_offload_is_planned_where_nothing_fits_without() -> None:
    arguments = ("--cluster", str(H100), "--workers", "1", *LARGE, "train.micro_batch=1", "elastic.max_workers=8")
    found = json.loads(planned("--json", *arguments))
    assert found["best"]["layout"]["offload"] == found["runs"]["1"]["layout"]["offload"] == "cpu"
    assert "offload" not in found["runs"]["8"]["layout"]


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
