"""A run that is recorded by a real MLflow server, which is killed and started again on the way. About 35 s."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from product import PATIENCE_S, Product


class Server:
    """`mlflow server` over an SQLite file, on a port of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder / 'served.db'}"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=self._folder
            )
        deadline = time.monotonic() + PATIENCE_S
        while not self._answers():
            said = (self._folder / "server.log").read_text()[-3000:]
            assert self._process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def recorded(server: Server, name: str) -> tuple[Any, list[Any]]:
    """A client, and the MLflow runs of this name."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("elastictrain")
    if experiment is None:
        return client, []
    return client, client.search_runs([experiment.experiment_id], f"tags.`elastictrain.run` = '{name}'")


def last_step(server: Server, name: str) -> int:
    """The last step that the server has the loss of."""
    client, runs = recorded(server, name)
    return max((m.step for run in runs for m in client.get_metric_history(run.info.run_id, "train/loss")), default=0)


def test_a_server_that_is_killed_and_comes_back_loses_nothing(product: Product, server: Server) -> None:
    """Delivered while the run goes on, or, on a machine where that ends before the server is back, afterwards."""
    served = (f"tracking.uri={server.uri}", "train.steps=600", "checkpoint.every=100", "checkpoint.keep_last=2")
    running = product.begin("served", *served)
    running.until("a record", lambda: last_step(server, "served"))
    server.kill()
    running.until("the news", lambda: "waits in the journal" in running.out.read_text())
    server.start()
    ended = running.end()
    assert ended.code == 0, ended.err
    if not running.stored.delivered:
        assert product.train("served", *served).code == 0
    report = product.report("served")

    client, (run,) = recorded(server, "served")
    run_id = run.info.run_id
    assert run.info.status == "FINISHED"
    losses = [(m.step, m.value) for m in client.get_metric_history(run_id, "train/loss")]
    assert sorted(losses) == [(step, loss) for step, loss in report["loss"]]
    for metric in run.data.metrics:
        points = Counter((m.timestamp, m.step, m.value) for m in client.get_metric_history(run_id, metric))
        assert set(points.values()) == {1}, metric
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'", max_results=1000)
    steps = Counter(int(model.tags["elastictrain.step"]) for model in models)
    assert steps == Counter(c["step"] for c in report["checkpoints"])
    (version,) = client.search_model_versions("name = 'served'")
    assert version.tags["elastictrain.step"] == str(report["steps"])
    assert client.get_model_version_by_alias("served", "best").version == version.version
    final = next(model for model in models if model.tags["elastictrain.step"] == str(report["steps"]))
    assert {a.path for a in client.list_logged_model_artifacts(final.model_id)} == {"README.md", "MLmodel", "run.json"}
