"""local.sh with real Ray nodes: one command starts them, a notice drains them, one command ends them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from files import CLUSTERS

PORT = 24790


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"PATH": path, "ELASTICTRAIN_LOCAL": str(tmp_path / "local"), "ELASTICTRAIN_PORT": str(PORT)}
    environment = {**os.environ, **own}
    yield environment
    if (tmp_path / "local/pids").exists():
        local("stop", environment)


def local(command: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(CLUSTERS / "local.sh"), *command.split()],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def variables(printed: str) -> dict[str, str]:
    lines = [line.removeprefix("export ") for line in printed.splitlines() if line.startswith("export ")]
    return dict(line.split("=", 1) for line in lines)


def dashboard(url: str, token: str | None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/api/jobs/", headers=headers), timeout=30) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def processes_of(address: str) -> list[psutil.Process]:
    """Those whose command line names this cluster."""
    every = psutil.process_iter(["cmdline"])
    return [process for process in every if any(address in word for word in process.info["cmdline"] or [])]


def lives(process: psutil.Process) -> bool:
    """Whether it runs still; one that ended and that init has not reaped yet does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_start_drain_stop(environment: dict[str, str], tmp_path: Path) -> None:
    started = local("start 2 1", environment)
    assert started.returncode == 0, started.stderr
    told = variables(started.stdout)
    assert told == variables(local("env", environment).stdout)
    token = Path(told["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert told["RAY_API_SERVER_ADDRESS"].startswith("http://127.0.0.1:")
    assert dashboard(told["RAY_API_SERVER_ADDRESS"], None) == 401
    assert dashboard(told["RAY_API_SERVER_ADDRESS"], token.read_text()) == 200
    pids = [int(line.split()[0]) for line in (tmp_path / "local/pids").read_text().splitlines()]
    started_by_it = [psutil.Process(pid) for pid in pids]
    family = processes_of(told["RAY_ADDRESS"])
    raylets = [process for process in family if process.name() == "raylet"]
    assert len(raylets) == 2

    again = local("start", environment)
    assert again.returncode == 1
    assert "clusters/local.sh stop" in again.stderr

    notice = subprocess.run(
        [sys.executable, str(CLUSTERS / "drain_node.py"), "now", "--seconds", "60", "--cluster", told["RAY_ADDRESS"]],
        env={**environment, **told}, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert notice.returncode == 0, notice.stderr
    assert psutil.wait_procs(raylets, timeout=20)[1] == [], "idle nodes end when they are drained"

    folder = Path((tmp_path / "local/folder").read_text().strip())
    stopped = local("stop", environment)
    assert stopped.returncode == 0, stopped.stderr
    assert not any(map(lives, started_by_it))
    assert psutil.wait_procs(family, timeout=20)[1] == []
    assert not folder.exists()
    assert not token.exists()


def test_a_killed_node_takes_all_of_its_processes_and_no_others(environment: dict[str, str], tmp_path: Path) -> None:
    nodes = [
        subprocess.Popen(["sh", "-c", "sleep 600 & sleep 600"], start_new_session=True, stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    try:
        families = [psutil.Process(node.pid).children() for node in nodes]
        state = tmp_path / "local"
        state.mkdir()
        began = [Path(f"/proc/{node.pid}/stat").read_text().rpartition(")")[2].split()[19] for node in nodes]
        (state / "pids").write_text("".join(f"{n.pid} {b}\n" for n, b in zip(nodes, began, strict=True)))
        for wrong in ("kill", "kill 0", "kill 2"):
            assert local(wrong, environment).returncode == 1
        done = local("kill 1", environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert nodes[1].wait(20) == -9
        assert psutil.wait_procs(families[1], timeout=20)[1] == []
        assert nodes[0].poll() is None
        again = local("kill 1", environment)
        assert "there is no node 1, or it has ended" in again.stderr
    finally:
        (tmp_path / "local/pids").unlink(missing_ok=True)
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, 9)
                node.wait()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("start many", "not 'many'"),
        ("start 2 0", "not '0'"),
        ("stop", "no cluster was started from here"),
        ("kill 1", "no cluster was started from here"),
    ],
)
def test_what_it_refuses(environment: dict[str, str], command: str, message: str) -> None:
    done = local(command, environment)
    assert done.returncode == 1
    assert message in done.stderr
