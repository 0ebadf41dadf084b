"""Shell: what shellcheck finds, and the Slurm job with a Slurm that is none, from its start to its requeue."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from files import CLUSTERS

SCRIPTS = sorted([*CLUSTERS.glob("*.sh"), *CLUSTERS.glob("*.sbatch")])
JOB = CLUSTERS / "slurm.sbatch"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    beside = Path(sys.executable).parent
    path = os.pathsep.join([str(beside), os.environ["PATH"]])
    done = subprocess.run(
        ["shellcheck", str(script)], capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


def directives() -> argparse.Namespace:
    """Slurm's own rules: lines that begin with #SBATCH, up to the first command, with long options of sbatch."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    for name in ("job-name", "output", "time", "signal", "open-mode"):
        parser.add_argument(f"--{name}")
    for name in ("nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("exclusive", "no-kill", "requeue"):
        parser.add_argument(f"--{name}", action="store_true")
    lines = JOB.read_text().splitlines()
    assert lines[0].startswith("#!")
    first_command = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])
    words = [w for line in lines[:first_command] if line.startswith("#SBATCH") for w in shlex.split(line)[1:]]
    return parser.parse_args(words)


def test_directives() -> None:
    found = directives()
    assert found.nodes > 1
    assert found.ntasks_per_node == 1
    assert found.no_kill, "a node that fails must not end the job"
    assert found.requeue
    assert found.open_mode == "append", "the log of the attempt before is kept"
    target, _, notice_s = found.signal.partition("@")
    assert target == "B:TERM", "the batch shell gets it, and Ray's nodes do not"
    assert 60 <= int(notice_s) <= 65535


FAKES = {
    "scontrol": 'if [ "$1" = show ]; then echo node-a; echo node-b; else echo "$@" >> told; fi',
    "squeue": 'echo "$STATE"',
    "srun": 'while case "$1" in -w) shift;; -*) ;; *) false;; esac; do shift; done; exec "$@"',
    "hostname": "echo 127.0.0.1",
    "ray": 'echo "ray $*" >> told; if [ "$1" = start ]; then exec cat hold; fi',
    "elastictrain": """
        cp -p "$RAY_AUTH_TOKEN_PATH" token; echo "driver $* $RAY_ADDRESS $RAY_AUTH_MODE $RAY_USE_TLS" >> told
        openssl verify -CAfile "$RAY_TLS_CA_CERT" "$RAY_TLS_SERVER_CERT" >> told
        trap 'echo "driver stops" >> told; kill $!; exit 130' TERM
        until [ "$(grep -c "^ray start" told)" = 2 ]; do sleep 0.01; done
        sleep 60 & echo ready > ready; wait $!""",
}
"""`hold` is a pipe that nobody opens for writing: Ray's node is there until it is told to end."""


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')
    for name, body in FAKES.items():
        command = tmp_path / ".venv/bin" / name
        command.write_text(f"#!/bin/bash\n{body}\n")
        command.chmod(0o755)
    (tmp_path / "clusters").symlink_to(CLUSTERS)
    os.mkfifo(tmp_path / "hold")
    os.mkfifo(tmp_path / "ready")
    return tmp_path


def notified(folder: Path, state: str) -> tuple[int, str, str]:
    environment = {
        "HOME": str(folder / "home"), "PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(folder), "STATE": state,
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_CPUS_PER_TASK": "3", "TMPDIR": str(folder),
    }  # fmt: skip
    with subprocess.Popen(
        ["bash", str(JOB), "my.yaml", "train.steps=7"], env=environment, stderr=subprocess.PIPE, text=True
    ) as job:
        (folder / "ready").read_text()  # returns once the driver trains
        job.send_signal(signal.SIGTERM)
        _, errors = job.communicate(timeout=60)
    return job.returncode, (folder / "told").read_text(), errors


def test_a_notice_stops_the_driver_first_and_requeues_the_job(slurm: Path) -> None:
    status, told, errors = notified(slurm, "RUNNING")
    assert status == 130, errors
    lines = told.splitlines()
    assert "driver train my.yaml train.steps=7 127.0.0.1:24711 token 1" in lines
    assert any(line.endswith("node.crt: OK") for line in lines), "the nodes' authority signed the driver's certificate"
    starts = [line for line in lines if line.startswith("ray start")]
    assert len(starts) == 2
    [head] = [line for line in starts if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in head
    assert lines.index("driver stops") < lines.index("requeue 4711")
    token = slurm / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64
    assert not (slurm / "home/.elastictrain/slurm/4711").exists(), "token and keys go with the job"
    assert not list(slurm.glob("tmp.*"))


def test_a_job_that_is_cancelled_stays_so(slurm: Path) -> None:
    status, told, errors = notified(slurm, "COMPLETING")
    assert status == 130, errors
    assert "requeue" not in told
