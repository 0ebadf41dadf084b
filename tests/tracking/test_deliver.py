"""Delivery to a real SQLite store, a dead server and a locked database. About 15 s, most of it MLflow's set-up."""

from __future__ import annotations

import json
import math
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import mlflow
import pytest
import yaml
from example_events import START_AT, Story, full_story
from mlflow.models import Model
from mlflow.types import DataType

from elastictrain.events import Event, StepCommitted, Warned
from elastictrain.tracking.deliver import Deliverer, Delivery
from elastictrain.tracking.journal import Journal
from elastictrain.tracking.ledger import goodput
from elastictrain.tracking.mlflow_record import TrackingUnavailableError
from elastictrain.tracking.sqlite_store import default_uri

EXPERIMENT = "tests"


def journal(run_folder: Path, events: list[Event]) -> None:
    """Append these events as their attempts would; a part of a run's events makes one more attempt's file."""
    run_folder.mkdir(exist_ok=True)
    writer = Journal(run_folder, len(list(run_folder.glob("journal/*"))) + 1)
    for event in events:
        writer.append(event)
    writer.close()


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return default_uri(tmp_path_factory.mktemp("storage"))


@pytest.fixture
def client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def history(client: Any, run_id: str, metric: str) -> list[tuple[int, float]]:
    """Each step and value, in step order."""
    return sorted((m.step, m.value) for m in client.get_metric_history(run_id, metric))


def test_one_mlflow_run_tells_the_whole_story(tmp_path: Path, uri: str, client: Any) -> None:
    story = full_story("whole")
    journal(tmp_path, story.events)
    deliverer = Deliverer(tmp_path, uri, EXPERIMENT, "whole")
    assert deliverer.deliver(60) == Delivery(done=True)
    run = client.get_run(deliverer.run_id)
    assert (run.info.run_name, run.info.status) == ("whole", "FINISHED")
    assert run.info.start_time == int(START_AT * 1000)
    assert run.info.end_time == int(story.clock * 1000)
    assert run.data.tags["elastictrain.attempts"] == "2"
    assert run.data.tags["elastictrain.status"] == "complete"
    assert "SIGKILL" in run.data.tags["elastictrain.last_failure"]
    assert run.data.tags["plan.layout"].startswith("dp")
    assert "nothing is known to be faster" in run.data.tags["plan.why"]
    assert "secret" not in run.data.tags["elastictrain.last_warning"]
    assert run.data.params["train.global_batch"] == "16"
    committed = [(e.step, e.loss) for e in story.events if isinstance(e, StepCommitted)]
    assert history(client, run.info.run_id, "train/loss") == sorted(committed)
    assert [step for step, _ in history(client, run.info.run_id, "ft/recovery_s")] == [81, 121]
    assert history(client, run.info.run_id, "ft/lost_steps") == [(81, 1.0), (121, 1.0)]
    for name in ("train/grad_norm", "train/learning_rate", "perf/tokens_per_s", "perf/step_s", "ft/detected_s"):
        assert name in run.data.metrics
    for name in ("ft/world_size", "goodput/ratio", "data/wait_s", "snapshot/stall_s", "ckpt/write_s"):
        assert name in run.data.metrics
    assert run.data.metrics["eval/bits_per_byte"] == 1.93
    assert run.data.metrics["system/node-1/cpu_utilization_percentage"] == 75
    assert run.data.metrics["system/node-0/system_memory_usage_percentage"] == 25
    artifacts = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"report.html", "report.json", "events.json", "config"}
    assert [a.path for a in client.list_artifacts(run.info.run_id, "config")] == [
        "config/attempt-0001.yaml",
        "config/attempt-0002.yaml",
    ]
    kept = yaml.safe_load(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/config/attempt-0002.yaml"))
    assert kept == story.config
    ledger = goodput(story.events)
    for bucket, seconds in ledger.seconds.items():
        assert run.data.metrics.get(f"goodput/{bucket}_s", 0.0) == pytest.approx(seconds)
    last = "runs/whole/checkpoints/step-00000200"
    assert run.data.tags["elastictrain.last_checkpoint"] == run.data.tags["elastictrain.best_checkpoint"] == last


def test_checkpoints_are_read_back_from_the_store(tmp_path: Path, uri: str) -> None:
    journal(tmp_path, full_story("listed").events)
    deliverer = Deliverer(tmp_path, uri, EXPERIMENT, "listed")
    deliverer.deliver(60)
    found = deliverer.checkpoints()
    assert [(c.step, c.removed) for c in found] == [(200, False), (160, False), (100, False), (50, True)]
    newest = found[0]
    assert newest.uri == "runs/listed/checkpoints/step-00000200"
    assert (len(newest.sha256), newest.num_bytes, newest.samples, newest.loss) == (64, 12_000_000, 3200, 3.0)
    assert newest.layout["dp"] == 2
    parents = {c.step: c.parent[-3:] for c in found}
    assert parents == {200: "160", 160: "100", 100: "050", 50: ""}
    assert [c.step for c in found if c.last] == [c.step for c in found if c.best] == [200]
    assert [c.step for c in Deliverer(tmp_path, uri, EXPERIMENT, "listed").checkpoints()] == [200, 160, 100, 50]


def test_a_later_process_delivers_only_the_rest(tmp_path: Path, uri: str, client: Any) -> None:
    story = Story("rest").start().generation().steps(20).kill()
    journal(tmp_path, story.events)
    first = Deliverer(tmp_path, uri, EXPERIMENT, "rest")
    assert first.deliver(60).done
    assert client.get_run(first.run_id).info.status == "RUNNING"
    told = len(story.events)
    journal(tmp_path, story.recover().steps(10).end("stopped").events[told:])
    second = Deliverer(tmp_path, uri, EXPERIMENT, "rest")
    assert second.deliver(60).done
    assert second.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "KILLED"
    assert [step for step, _ in history(client, first.run_id, "train/loss")] == list(range(1, 32))
    ((step, recovery_s),) = history(client, first.run_id, "ft/recovery_s")
    assert (step, round(recovery_s, 3)) == (21, 0.96), "the failure was delivered by the process before"


@pytest.mark.parametrize("position", ["old", "none", "damaged"])
def test_delivering_twice_changes_nothing(tmp_path: Path, uri: str, client: Any, position: str) -> None:
    name = f"twice-{position}"
    story = Story(name).start().generation().steps(5)
    journal(tmp_path, story.events)
    assert Deliverer(tmp_path, uri, EXPERIMENT, name).deliver(60).done
    before = (tmp_path / "mlflow.json").read_text()
    told = len(story.events)
    story.steps(30).checkpoint().kill().recover().checkpoint().evaluate().end()
    journal(tmp_path, story.events[told:])
    once = Deliverer(tmp_path, uri, EXPERIMENT, name)
    assert once.deliver(60).done
    if position == "none":
        (tmp_path / "mlflow.json").unlink()
    else:
        (tmp_path / "mlflow.json").write_text(before if position == "old" else before[:7])
    again = Deliverer(tmp_path, uri, EXPERIMENT, name)
    assert again.deliver(60).done
    assert again.run_id == once.run_id
    for metric in client.get_run(once.run_id).data.metrics:
        points = Counter((m.timestamp, m.step, m.value) for m in client.get_metric_history(once.run_id, metric))
        assert set(points.values()) == {1}, metric
    assert [c.step for c in again.checkpoints()] == [36, 35]
    assert [int(v.version) for v in client.search_model_versions(f"name = '{name}'")] == [1]


def test_a_finished_model_is_in_the_registry_with_signature_and_card(tmp_path: Path, uri: str, client: Any) -> None:
    story = full_story("finished")
    journal(tmp_path, story.events)
    deliverer = Deliverer(tmp_path, uri, EXPERIMENT, "finished")
    assert deliverer.deliver(60).done
    newest = deliverer.checkpoints()[0]
    version = client.get_model_version_by_alias("finished", "last")
    assert version.run_id == deliverer.run_id
    assert version.tags["elastictrain.sha256"] == newest.sha256
    assert version.tags["elastictrain.uri"] == newest.uri
    folder = Path(url2pathname(urlparse(version.source).path))
    assert {path.name for path in folder.iterdir()} == {"MLmodel", "README.md", "run.json"}  # nothing pickled
    described = Model.load(str(folder / "MLmodel"))
    assert described.signature.inputs.input_types() == [DataType.string]
    assert described.flavors["elastictrain"]["sha256"] == newest.sha256
    assert described.flavors["python_function"]["loader_module"] == "elastictrain.export.pyfunc"
    card = (folder / "README.md").read_text()
    assert card == version.description
    for told in (newest.sha256, newest.uri, "1.9300 bits per byte", "3,200 samples", "2 failures survived"):
        assert told in card

    told_before = len(story.events)
    story.start().generation(first_step=201, cause="resume").steps(10).checkpoint().end()  # longer, and not evaluated
    journal(tmp_path, story.events[told_before:])
    assert Deliverer(tmp_path, uri, EXPERIMENT, "finished").deliver(60).done
    assert client.get_model_version_by_alias("finished", "last").tags["elastictrain.step"] == "210"
    assert client.get_model_version_by_alias("finished", "best").tags["elastictrain.step"] == "200"


def test_a_stopped_run_has_no_model_in_the_registry(tmp_path: Path, uri: str, client: Any) -> None:
    journal(tmp_path, Story("unfinished").start().generation().steps(5).checkpoint().end("stopped").events)
    assert Deliverer(tmp_path, uri, EXPERIMENT, "unfinished").deliver(60).done
    assert list(client.search_model_versions("name = 'unfinished'")) == []


def test_free_fields_may_change_between_attempts(tmp_path: Path, uri: str, client: Any) -> None:
    story = Story("changed").start().generation().steps(2)
    story.config = {**story.config, "train": {**story.config["train"], "steps": 999}}
    journal(tmp_path, story.start().events)
    deliverer = Deliverer(tmp_path, uri, EXPERIMENT, "changed")
    assert deliverer.deliver(60) == Delivery(done=True)
    run = client.get_run(deliverer.run_id)
    assert (run.data.params["train.steps"], run.data.tags["config.train.steps"]) == ("200", "999")


def test_a_failed_run_says_so(tmp_path: Path, uri: str, client: Any) -> None:
    story = Story("failed").start().generation().steps(3, loss=math.nan).bug()
    story.end("failed")
    journal(tmp_path, story.events)
    deliverer = Deliverer(tmp_path, uri, EXPERIMENT, "failed")
    assert deliverer.deliver(60).done
    run = client.get_run(deliverer.run_id)
    assert run.info.status == "FAILED"
    assert "ValueError" in run.data.tags["elastictrain.last_failure"]
    assert math.isnan(run.data.metrics["train/loss"])


def test_a_run_begun_anew_under_its_name_gets_a_record_of_its_own(tmp_path: Path, uri: str) -> None:
    ids = set()
    for folder, pause in (("one", 0), ("two", 100)):
        journal(tmp_path / folder, Story("again").wait(pause).start().generation().steps(1).events)
        deliverer = Deliverer(tmp_path / folder, uri, EXPERIMENT, "again")
        assert deliverer.deliver(60).done
        ids.add(deliverer.run_id)
    assert len(ids) == 2


def test_a_record_deleted_by_hand_is_written_anew(tmp_path: Path, uri: str, client: Any) -> None:
    journal(tmp_path, Story("deleted").start().generation().steps(4).events)
    first = Deliverer(tmp_path, uri, EXPERIMENT, "deleted")
    first.deliver(60)
    client.delete_run(first.run_id)
    second = Deliverer(tmp_path, uri, EXPERIMENT, "deleted")
    assert second.deliver(60).done
    assert second.run_id != first.run_id
    assert len(history(client, second.run_id, "train/loss")) == 4


def test_a_locked_database_loses_nothing(tmp_path: Path, uri: str, client: Any) -> None:
    story = Story("locked").start().generation().steps(5)
    journal(tmp_path, story.events)
    deliverer = Deliverer(tmp_path, uri, EXPERIMENT, "locked")
    assert deliverer.deliver(60).done
    told = len(story.events)
    journal(tmp_path, story.steps(5).events[told:])
    lock = sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    begun = time.monotonic()
    refused = deliverer.deliver(60)
    elapsed = time.monotonic() - begun
    lock.execute("ROLLBACK")
    lock.close()
    assert not refused.done
    assert "locked" in refused.problem
    assert elapsed < 10
    assert deliverer.deliver(60) == Delivery(done=True)
    assert len(history(client, deliverer.run_id, "train/loss")) == 10


def test_a_dead_server_costs_seconds_and_says_which(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    journal(tmp_path, Story("dead").start().generation().steps(5).events)
    deliverer = Deliverer(tmp_path, f"http://user:hunter2@127.0.0.1:{port}", EXPERIMENT, "dead")
    begun = time.monotonic()
    delivery = deliverer.deliver(30)
    assert time.monotonic() - begun < 15
    assert not delivery.done
    assert f"127.0.0.1:{port}" in delivery.problem
    assert "hunter2" not in delivery.problem
    with pytest.raises(TrackingUnavailableError):
        deliverer.checkpoints()


def test_a_store_that_is_no_database_is_a_problem_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is not SQLite" * 100)
    journal(tmp_path, Story("broken").start().events)
    delivery = Deliverer(tmp_path, default_uri(tmp_path), EXPERIMENT, "broken").deliver(30)
    assert "not a database" in delivery.problem


def test_no_time_left_is_no_problem(tmp_path: Path, uri: str) -> None:
    journal(tmp_path, Story("late").start().generation().steps(700).events)
    deliverer = Deliverer(tmp_path, uri, EXPERIMENT, "late")
    assert deliverer.deliver(-1) == Delivery(done=False)
    assert deliverer.deliver(60) == Delivery(done=True)


def test_an_empty_journal_needs_no_store(tmp_path: Path) -> None:
    assert Deliverer(tmp_path, "http://127.0.0.1:1", EXPERIMENT, "none").deliver(5) == Delivery(done=True)


def test_a_torn_line_is_delivered_once_it_is_whole(tmp_path: Path, uri: str, client: Any) -> None:
    journal(tmp_path, Story("torn").start().generation().steps(3).events)
    path = tmp_path / "journal" / "attempt-0001.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    deliverer = Deliverer(tmp_path, uri, EXPERIMENT, "torn")
    assert deliverer.deliver(60).done
    assert len(history(client, deliverer.run_id, "train/loss")) == 2
    path.write_bytes(whole)
    assert deliverer.deliver(60).done
    assert len(history(client, deliverer.run_id, "train/loss")) == 3


def test_long_values_are_cut_not_refused(tmp_path: Path, uri: str) -> None:
    story = Story("long").start()
    story.tell(Warned(story.clock, "topic", "x" * 100_000))
    journal(tmp_path, story.events)
    assert Deliverer(tmp_path, uri, EXPERIMENT, "long").deliver(60) == Delivery(done=True)


def test_a_first_delivery_is_silent_and_leaves_nothing_in_the_working_folder(tmp_path: Path) -> None:
    run_folder, cwd = tmp_path / "storage" / "quiet", tmp_path / "cwd"
    run_folder.mkdir(parents=True)
    cwd.mkdir()
    journal(run_folder, full_story("quiet").events)
    code = (
        "import sys; from pathlib import Path\n"
        "from elastictrain.tracking.deliver import Deliverer\n"
        "from elastictrain.tracking.sqlite_store import default_uri\n"
        "assert 'mlflow' not in sys.modules\n"
        "folder = Path(sys.argv[1])\n"
        "assert Deliverer(folder, default_uri(folder.parent), 'e', 'quiet').deliver(60).done\n"
    )
    environment = os.environ | {"XDG_CONFIG_HOME": str(tmp_path / "settings")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_folder)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert not (tmp_path / "settings").exists(), "MLflow tells nobody of itself"
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(cwd.iterdir()) == []
    assert {p.name for p in run_folder.parent.iterdir()} == {"quiet", "mlflow.db", "mlartifacts"}
    assert set(json.loads((run_folder / "mlflow.json").read_text())) == {"run_id", "attempt", "offset"}
