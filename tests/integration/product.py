"""Drives elastictrain as its users do: the command line in processes of its own, and what it says about its runs.

A run is judged by its report: `check_story` holds what must be true of every run, whatever happened to it. A tiny
model on a few files of the standard library: a step takes about 20 ms, a start on a cluster that is up 8 to 12 s. The
learning rate is constant after the warm-up, so that runs of different lengths agree on the steps that they share.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from elastictrain.cli.runs import StoredRun
from elastictrain.data.order import EMPTY_CHAIN, SampleOrder, chain
from elastictrain.events import Event
from elastictrain.plan.layout import Layout
from elastictrain.status import Status
from elastictrain.storage import Storage
from elastictrain.tracking.ledger import BUCKETS

Report = dict[str, Any]

PROGRAM = str(Path(sys.executable).with_name("elastictrain"))
PATIENCE_S = 200.0
"""Longest wait for anything on a busy machine; what fails ends sooner."""
MARK = "ELASTICTRAIN_TEST_MARK"
"""Environment variable that every process of a run inherits from the driver that the test started."""
ACTORS = ("ray::Worker", "ray::Keeper", "ray::Tracker")

_GONE_IS_FINE = suppress(psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError)

SEED = 3
GLOBAL_BATCH = 8
STEPS = 150
TINY = {
    "train": {
        "steps": STEPS,
        "global_batch": GLOBAL_BATCH,
        "micro_batch": 2,
        "seed": SEED,
        "learning_rate": 3e-3,
        "min_learning_rate": 3e-3,
        "warmup_steps": 5,
        "sample_tokens": 4,
        "compile": False,  # runs of any length are compared bit for bit, and start at once
    },
    "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "dropout": 0.1},
    "data": {
        "corpus": str(Path(sysconfig.get_paths()["stdlib"]) / "json"),
        "seq_len": 32,
        "vocab_size": 512,
        "num_shards": 2,
        "validation_fraction": 0.2,
        "validation_samples": 8,
    },
    "elastic": {"min_workers": 2, "standby": 0},  # going on with one would change the bits
    "snapshot": {"every": 1},  # faults strike in snapshots too
    "checkpoint": {"every": 50},
}


@dataclass
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class Running:
    """A driver under way."""

    name: str
    process: subprocess.Popen[bytes]
    stored: StoredRun
    out: Path
    err: Path
    mark: str

    def events(self) -> list[Event]:
        """The journal so far."""
        return self.stored.events()

    def told(self, kind: type[Event]) -> list[Any]:
        """The events of this kind so far."""
        return [e for e in self.events() if isinstance(e, kind)]

    def status(self) -> Status | None:
        """What `elastictrain status` reads."""
        return self.stored.status() if self.stored.storage.exists("status.json") else None

    def until(self, what: str, condition: Callable[[], Any]) -> Any:
        """Wait for a true value of `condition`; fails when the driver ends before, or the patience."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            ended = self.process.poll() is not None
            if ended and (found := condition()):
                return found
            if ended or time.monotonic() > deadline:
                state = f"the driver has ended ({self.process.returncode})" if ended else "no patience is left"
                raise AssertionError(f"{what}: {state}\n{self._said()}")
            time.sleep(0.04)  # two steps; a look reads the whole journal, or parses the status
        return found

    def until_step(self, step: int) -> None:
        """Wait until this step is committed."""
        self.until(f"step {step}", lambda: (s := self.status()) and s.step >= step)

    def until_running(self, generation: int, step: int = 0) -> Status:
        """Wait until this or a later generation has committed a step, and `step` is done."""

        def there() -> Status | None:
            status = self.status()
            grown = status and status.status == "running" and status.generation >= generation and status.step >= step
            return status if grown else None

        status: Status = self.until(f"generation {generation} at step {step}", there)
        return status

    def end(self) -> Finished:
        """Wait for its end."""
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the driver does not end\n{self._said()}") from None
        return Finished(self.process.returncode, self.out.read_text(), self.err.read_text())

    def stop(self) -> Finished:
        """SIGTERM, and its end."""
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def family(self) -> list[psutil.Process]:
        """Every living process that this driver started, it and the embedded cluster included."""
        return marked(self.mark)

    def _said(self) -> str:
        return f"--- stdout\n{self.out.read_text()[-3000:]}\n--- stderr\n{self.err.read_text()[-3000:]}"


@dataclass
class Product:
    """One storage, and the cluster that its runs use: that of `address`, or an embedded one each."""

    folder: Path
    address: str = "local"
    passing: str | None = None
    """TMPDIR of the drivers: what they leave behind there shows."""
    _begun: list[Running] = field(default_factory=list)

    @property
    def storage(self) -> Path:
        """run.storage of all runs."""
        return self.folder / "storage"

    def begin(
        self,
        name: str,
        *overrides: str,
        storage: Path | None = None,
        command: tuple[str, ...] = ("train",),
        environment: Mapping[str, str | None] | None = None,
    ) -> Running:
        """Start `elastictrain train`, or another command that takes a config; `environment` is what it has else."""
        storage = storage or self.storage
        config = self.folder / "tiny.json"
        config.write_text(json.dumps(TINY))
        mark = uuid.uuid4().hex
        number = len(self._begun)
        out, err = self.folder / f"{number}-{name}.out", self.folder / f"{number}-{name}.err"
        line = [PROGRAM, *command, str(config), f"run.name={name}", f"run.storage={storage}", *overrides]
        line += [f"cluster.address={self.address}"]
        its_own: dict[str, str | None] = {**os.environ, "OMP_NUM_THREADS": "1", MARK: mark}
        if self.passing:  # an embedded cluster has a token of its own
            its_own |= {"RAY_AUTH_MODE": None, "TMPDIR": self.passing}
        its_own |= environment or {}
        given = {key: value for key, value in its_own.items() if value is not None}
        with out.open("wb") as out_file, err.open("wb") as err_file:
            process = subprocess.Popen(
                line, stdout=out_file, stderr=err_file, env=given, start_new_session=True, cwd=self.folder
            )
        stored = StoredRun(name, Storage.open(str(storage)).run(name))
        running = Running(name, process, stored, out, err, mark)
        self._begun.append(running)
        return running

    def know(self, running: Running) -> None:
        """Look after a driver that a test has started itself."""
        self._begun.append(running)

    def train(self, name: str, *overrides: str, storage: Path | None = None) -> Finished:
        """`elastictrain train` to its end."""
        return self.begin(name, *overrides, storage=storage).end()

    def ask(self, *command: str, storage: Path | None = None) -> Finished:
        """Another command, about the storage."""
        done = subprocess.run(
            [PROGRAM, *command, "--storage", str(storage or self.storage)], capture_output=True, text=True, timeout=60
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def checkpoints(self, name: str, *options: str, storage: Path | None = None) -> tuple[int, list[dict[str, Any]]]:
        """`checkpoints --json`: the exit status and the list."""
        asked = self.ask("checkpoints", name, "--json", *options, storage=storage)
        return asked.code, json.loads(asked.out)

    def report(self, name: str, storage: Path | None = None) -> Report:
        """`report --json`, checked for what is true of every run."""
        asked = self.ask("report", name, "--json", storage=storage)
        assert asked.code == 0, asked.err
        report: Report = json.loads(asked.out)
        check_story(report)
        return report

    def living(self) -> list[psutil.Process]:
        """Every living process of the drivers that were started here."""
        return [process for running in self._begun for process in running.family()]

    def close(self) -> None:
        """End what still lives, after a test that failed."""
        kill(self.living())
        for running in self._begun:
            running.process.wait()


def check_story(report: Report) -> None:
    """What must be true of every run's report: the samples, the time, the generations and the failures add up."""
    steps, data = report["steps"], report["data"]
    assert [step for step, _ in report["loss"]] == list(range(1, steps + 1))
    skipped = {skip["step"] for skip in report["skipped_steps"]}
    assert all(step in skipped or math.isfinite(loss) for step, loss in report["loss"])
    assert report["samples"] == steps * GLOBAL_BATCH
    if data is not None:
        assert report["sample_digest"] == expected_digest(data["num_samples"], steps)

    goodput = report["goodput"]
    assert set(goodput) == {*BUCKETS, "wall_s", "ratio"}
    assert all(goodput[bucket] >= 0 for bucket in BUCKETS)
    assert math.fsum(goodput[bucket] for bucket in BUCKETS) == pytest.approx(goodput["wall_s"])
    assert goodput["wall_s"] == report["wall_s"]
    productive_s = goodput["compute"] + goodput["communication"]
    assert goodput["ratio"] == pytest.approx(productive_s / goodput["wall_s"])
    workers = report["worker_seconds"]
    assert math.fsum(workers[bucket] for bucket in BUCKETS) == pytest.approx(workers["total"])

    generations = report["generations"]
    indices = [g["index"] for g in generations]
    assert indices == sorted(set(indices))
    for generation in generations:
        layout = Layout.from_json(generation["layout"])
        assert layout.world_size == generation["world_size"] == len(generation["members"])
        assert layout.global_batch == GLOBAL_BATCH
        assert [m["rank"] for m in generation["members"]] == list(range(generation["world_size"]))
        assert 1 <= generation["first_step"] <= steps + 1
        assert (generation["first_step"] == 1) >= (generation["source"] == "fresh")
    for attempt in report["attempts"]:
        first_steps = [g["first_step"] for g in generations if g["attempt"] == attempt["attempt"]]
        assert first_steps == sorted(first_steps)

    for failure in report["failures"]:
        assert failure["generation"] in {*indices, *(index + 1 for index in indices)}
        assert 0 <= failure["detected_s"] < (15 if failure["kind"] != "driver_lost" else math.inf)
        assert failure["cause"]["message"]
        if failure["recovered_s"] is not None:
            assert failure["recovered_s"] >= failure["detected_s"]
    for checkpoint in report["checkpoints"]:
        assert checkpoint["samples"] == checkpoint["step"] * GLOBAL_BATCH
        assert checkpoint["stall_s"] < 1


def assert_same_training(report: Report, undisturbed: Report) -> None:
    """Bit for bit the same losses and the same samples, over all steps that both have."""
    steps = min(report["steps"], undisturbed["steps"])
    assert report["loss"][:steps] == undisturbed["loss"][:steps]
    if report["steps"] == undisturbed["steps"]:
        assert report["sample_digest"] == undisturbed["sample_digest"]


def assert_near(report: Report, undisturbed: Report) -> None:
    """The same samples; losses that differ by no more than another order of float sums explains."""
    for (step, loss), (_, other) in zip(report["loss"], undisturbed["loss"], strict=False):
        assert math.isclose(loss, other, rel_tol=1e-4), f"step {step}: {loss} and {other}"
    if report["steps"] == undisturbed["steps"]:
        assert report["sample_digest"] == undisturbed["sample_digest"]


def mlflow_run(storage: Path, name: str) -> tuple[Any, Any]:
    """A client, and the one MLflow run of this name."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("elastictrain")
    [run] = client.search_runs([experiment.experiment_id], f"tags.`elastictrain.run` = '{name}'")
    return client, run


def assert_recorded(storage: Path, report: Report) -> str:
    """The one MLflow run of all attempts tells what the report tells; its id."""
    client, run = mlflow_run(storage, report["run"])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted([m.step, m.value] for m in history) == report["loss"]
    assert run.info.status == {"complete": "FINISHED", "stopped": "KILLED"}[report["status"]]
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    recorded = {
        (int(m.tags["elastictrain.step"]), m.tags["elastictrain.sha256"], m.tags["elastictrain.removed"] == "true")
        for m in models
    }
    assert recorded == {(c["step"], c["sha256"], c["removed"]) for c in report["checkpoints"]}
    return str(run.info.run_id)


def expected_digest(num_samples: int, steps: int) -> str:
    """The digest of a run that used every sample once per epoch, in order."""
    order, digest = SampleOrder(num_samples, SEED), EMPTY_CHAIN
    for step in range(1, steps + 1):
        digest = chain(digest, order.step_samples(step, GLOBAL_BATCH))
    return digest


def marked(mark: str) -> list[psutil.Process]:
    """The living processes with this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with _GONE_IS_FINE:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def copied(storage: Path, to: Path) -> Path:
    """This storage somewhere else, as after a move."""
    shutil.copytree(storage, to)
    return to


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL, all of them."""
    for process in processes:
        with _GONE_IS_FINE:
            process.kill()


def eventually_none(find: Callable[[], list[psutil.Process]], patience_s: float = 15.0) -> list[str]:
    """What `find` still finds after its patience, in words: empty when all is well."""
    deadline = time.monotonic() + patience_s
    while (left := find()) and time.monotonic() < deadline:
        time.sleep(0.05)
    told = []
    for process in left:
        with _GONE_IS_FINE:
            told.append(f"{process.pid} {process.name()} {' '.join(process.cmdline())[:120]}")
    return told
