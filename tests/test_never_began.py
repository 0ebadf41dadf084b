"""An attempt that never had a cluster never was: it leaves what was there before it, and nothing else."""

from __future__ import annotations

import fcntl
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastictrain.config import TrainConfig
from elastictrain.errors import InfrastructureError, RunConflictError
from elastictrain.events import Cause, Event, RunEnded, RunStarted
from elastictrain.runtime.home import RunHome
from elastictrain.status import Status
from elastictrain.tracking.journal import Journal, read_journal
from elastictrain.trainer import ElasticTrainer


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def config_in(folder: Path, *overrides: str) -> TrainConfig:
    (folder / "text.txt").write_text("some text\n" * 2000)
    common = ["run.name=demo", f"run.storage={folder / 'runs'}", f"data.corpus={folder / 'text.txt'}"]
    return TrainConfig.load(None, [*common, *overrides])


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("what", ["dashboard", "cluster"])
def test_of_a_new_run_nothing_is_left(tmp_path: Path, taken_port: int, what: str) -> None:
    if what == "dashboard":
        overrides = ["cluster.address=local", "cluster.dashboard=true", f"cluster.dashboard_port={taken_port}"]
        words = f"port {taken_port} .* is in use"
    else:
        overrides, words = ["cluster.address=127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1"
    with pytest.raises(InfrastructureError, match=words):
        ElasticTrainer(config_in(tmp_path, *overrides), progress=None).fit()
    assert list((tmp_path / "runs").iterdir()) == []


def test_an_older_run_stays_what_it_was(tmp_path: Path, taken_port: int) -> None:
    config = config_in(tmp_path, "cluster.dashboard=true", f"cluster.dashboard_port={taken_port}")
    home = RunHome(config)
    home.check_config(begun=False)
    Journal(home.folder, 1).close()
    (home.folder / "status.json").write_text("what the last attempt said")
    (home.folder / "lock").write_text("1 on here")
    before = everything(tmp_path)
    with pytest.raises(InfrastructureError, match="is in use"):
        ElasticTrainer(config, progress=None).fit()
    assert {**everything(tmp_path), "runs/demo/lock": b"1 on here"} == before


class StopsAt:
    """Somebody who ends the run as soon as this is told."""

    def __init__(self, told: type[Event]) -> None:
        self._told = told

    def on_event(self, event: Event) -> None:
        if isinstance(event, self._told):
            signal.raise_signal(signal.SIGTERM)

    def on_status(self, status: Status) -> None:
        pass


def test_a_stop_at_the_first_word_is_told_as_a_stop(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        ElasticTrainer(config, progress=StopsAt(RunStarted)).fit()
    folder = tmp_path / "runs" / "demo"
    begun, *_, ended = read_journal(folder)
    assert isinstance(begun, RunStarted)
    assert isinstance(ended, RunEnded)
    assert (ended.status, ended.cause) == ("stopped", Cause("stop", "SIGTERM received"))
    assert json.loads((folder / "status.json").read_bytes())["status"] == "stopped"
    assert (folder / "report.html").exists()


def test_a_stop_while_the_end_is_told_does_not_break_it_off(tmp_path: Path) -> None:
    class Impatient(StopsAt):
        def on_event(self, event: Event) -> None:
            if isinstance(event, RunStarted | RunEnded):
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        ElasticTrainer(config_in(tmp_path), progress=Impatient(RunEnded)).fit()
    folder = tmp_path / "runs" / "demo"
    assert [type(e) for e in read_journal(folder)] == [RunStarted, RunEnded]
    assert json.loads((folder / "status.json").read_bytes())["status"] == "stopped"


def test_what_a_user_put_into_the_folder_stays(tmp_path: Path) -> None:
    home = RunHome(config_in(tmp_path))
    (home.folder / "notes.txt").write_text("mine")
    with home.locked():
        home.check_config(begun=False)
        journal = Journal(home.folder, 1)
        journal.close()
        home.forget(journal.path, None)
    assert [p.name for p in home.folder.iterdir()] == ["notes.txt"]


def test_who_waited_for_a_lock_that_was_removed_locks_the_next_one(tmp_path: Path) -> None:
    """Else a third process would lock the new file, and two would train the run."""
    home, entered, leave = RunHome(config_in(tmp_path)), threading.Event(), threading.Event()

    def wait_and_train() -> None:
        with home.locked():
            entered.set()
            leave.wait(60)

    hold = "import fcntl,sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_SH); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(home.folder / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(RunConflictError, match="is being trained now"), home.locked():
            pass
        old = (home.folder / "lock").open("rb")
        (home.folder / "lock").unlink()
        second = threading.Thread(target=wait_and_train)
        second.start()
        assert entered.wait(60), "the lock of a file that is gone holds up nobody"
        with pytest.raises(RunConflictError), home.locked():
            pass
        leave.set()
        second.join()
        holder.communicate(b"\n")
        fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
        old.close()
