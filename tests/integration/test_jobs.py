"""What is in jobs/, each through `ray job submit`, in the order in which a user might: prepare a corpus, train on it,
export the model, fine-tune that, sweep.

About 95 s on two cores.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from product import MARK, PATIENCE_S, Finished, Product, eventually_none, kill, marked

ROOT = Path(__file__).parents[2]
SMALL = (
    f"data.corpus={Path(sysconfig.get_paths()['stdlib']) / 'json'}",
    "data.validation_fraction=0.2",
    "data.validation_samples=8",
    "train.sample_tokens=4",
    "elastic.max_workers=1",
    "elastic.standby=0",
    "faults=[]",
)

TINY = ("--config", "jobs/llm_tiny.yaml", "data.seq_len=32", "data.vocab_size=512", "data.num_shards=2")


@dataclass(frozen=True)
class Jobs:
    """A cluster that takes jobs, and a storage."""

    url: str
    folder: Path
    environment: dict[str, str]

    def submit(self, script: str, *arguments: str) -> Finished:
        """`ray job submit` of a script in jobs/, to its end."""
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "job", "submit", "--address", self.url, "--working-dir", str(self.folder / "work"), "--"]
        command += [sys.executable, f"jobs/{script}", *arguments, f"run.storage={self.folder / 'runs'}", *SMALL]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """One node with two CPUs and a dashboard; afterwards not one of its processes is left."""
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("jobs")
    passing, mark = Path(tempfile.mkdtemp(prefix="et-")), uuid.uuid4().hex
    (passing / "ray").mkdir()
    shutil.copytree(ROOT / "jobs", folder / "work" / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    space = folder / "work" / "jobs" / "tune_llm.yaml"
    space.write_text(space.read_text().replace("trials: 6", "trials: 2"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(passing), "OMP_NUM_THREADS": "1", MARK: mark}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        node = {"num_cpus": 2, "object_store_memory": 100 * 2**20, "dashboard_agent_listen_port": 0}
        head = {"node_ip_address": "127.0.0.51", "temp_dir": str(passing / "ray"), "include_dashboard": True}
        cluster = Cluster(
            initialize_head=True, head_node_args=node | head | {"dashboard_host": "127.0.0.1", "dashboard_port": port}
        )
        try:
            yield Jobs(f"http://127.0.0.1:{port}", folder, dict(os.environ))
        finally:
            cluster.shutdown()
            left = eventually_none(lambda: marked(mark))
            kill(marked(mark))
            shutil.rmtree(passing, ignore_errors=True)
    assert not left


def test_from_a_corpus_to_a_fine_tuned_model(jobs: Jobs) -> None:
    prepared = jobs.submit("prepare_corpus.py", *TINY)
    assert prepared.code == 0, prepared.out + prepared.err
    assert " documents, " in prepared.out
    assert [path.name for path in (jobs.folder / "runs").iterdir()] == ["_data"]

    trained = jobs.submit("train_llm.py", *TINY, "run.name=tiny", "train.steps=60", "train.global_batch=8")
    assert trained.code == 0, trained.out + trained.err
    assert "data found unchanged" in trained.out
    product = Product(jobs.folder)
    runs = jobs.folder / "runs"
    model = jobs.folder / "model"
    exported = product.ask("export", "tiny", "--to", str(model), storage=runs)
    assert exported.code == 0, exported.err
    assert exported.out.startswith("step 60 of run tiny: ")
    other = product.ask("export", "tiny", "--to", str(jobs.folder / "other"), "--step", "7", storage=runs)
    assert (other.code, other.err) == (6, "error: run tiny has no checkpoint of step 7; it keeps 60\n")
    assert not (jobs.folder / "other").exists()

    tuned = jobs.submit(
        "finetune_hf.py", "--model", str(model), "--config", "jobs/finetune_hf.yaml", "data.seq_len=32",
        "train.steps=10", "train.global_batch=8", "train.micro_batch=4", "data.num_shards=2",
    )  # fmt: skip
    assert tuned.code == 0, tuned.out + tuned.err
    first, second = (
        json.loads(product.ask("report", name, "--json", storage=runs).out) for name in ("tiny", "finetuned")
    )
    losses = [loss for _, loss in second["loss"]]
    assert len(losses) == 10
    assert first["data"]["num_samples"] == second["data"]["num_samples"], "the same tokens, by the model's tokenizer"
    learned, reached = math.log(512) - first["loss"][-1][1], math.log(512) - losses[0]
    assert reached > 0.7 * learned > 0.5, "it starts from what was learned"
    assert second["evaluation"]["loss"] < first["evaluation"]["loss"] + 0.05

    ours = jobs.submit(
        "finetune_hf.py", "--config", "jobs/finetune_hf.yaml", "run.name=ours", "--model", str(model),
        "data.seq_len=32", "train.steps=10", "train.global_batch=8", "train.micro_batch=4", "data.num_shards=2",
        "model.kind=transformer", "train.dtype=fp32",
    )  # fmt: skip
    assert ours.code == 0, ours.out + ours.err
    third = json.loads(product.ask("report", "ours", "--json", storage=runs).out)
    assert [loss for _, loss in third["loss"]] == pytest.approx(losses, abs=0.02), "that one was bf16"

    again = jobs.folder / "tuned"
    assert product.ask("export", "finetuned", "--to", str(again), storage=runs).code == 0
    assert sorted(path.name for path in again.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert (again / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_a_sweep(jobs: Jobs) -> None:
    space = ("--space", "jobs/tune_llm.yaml")
    swept = jobs.submit("tune_llm.py", *space, *TINY, "train.steps=20", "train.global_batch=8")
    assert swept.code == 0, swept.out + swept.err
    assert "tiny-sweep-2 starts: train.learning_rate" in swept.out
    sweep = json.loads((jobs.folder / "runs" / "_sweeps" / "tiny-sweep" / "sweep.json").read_bytes())
    assert [trial["state"] for trial in sweep["trials"]] == ["complete", "complete"]
    assert all(trial["step"] == 20 and trial["points"][-1][1] < math.log(512) for trial in sweep["trials"])
