"""One worker of elastictrain killed from outside, and what its own report says of the recovery.

All through the command line, as a user would: `train` joins the cluster, `status --json` tells the pids and
`report --json` the times. Only what a step takes comes from the journal, since the report has means over the whole run.
The kill comes once a warm standby is there and training is well under way.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import Recovery, pace, phases_between
from two_nodes import Job, Nodes, running

from elastictrain.events import StepCommitted
from elastictrain.tracking.journal import read_journal

COMMAND = Path(sys.executable).with_name("elastictrain")
START_TIMEOUT_S = 180.0
RECOVER_TIMEOUT_S = 120.0
LOOK_EVERY_S = 1.0
QUIET_S = 3.0
"""Nobody asks for status or report for so long around the kill: a question costs half a second of CPU."""


def recover(
    name: str,
    job: Path,
    overrides: Sequence[str],
    folder: Path,
    ray_address: str,
    rank: int,
    min_step: int,
    wait_s: float,
    nodes: Nodes | None = None,
) -> Recovery:
    """Train, kill this rank's process at `wait_s` after everything is ready, and measure.

    With `nodes`, kill its whole node, or that of another rank if it is the head.
    """
    storage = folder / "runs"
    settings = [*overrides, f"run.name={name}", f"run.storage={storage}"]
    command = [str(COMMAND), "train", str(job), *settings]
    with running(command, folder / f"{name}.log", ray_address) as train:
        status = wait_until_ready(train, name, storage, min_step)
        time.sleep(QUIET_S + wait_s)
        pids = {w["rank"]: w["pid"] for w in status["workers"]}
        if nodes is not None and nodes.on_head(pids[rank]):
            rank = next(r for r in pids if not nodes.on_head(pids[r]))
        victim = pids[rank]
        killed_at = time.time()
        if nodes is None:
            os.kill(victim, signal.SIGKILL)
        else:
            nodes.kill_node_of(victim)
        end = time.monotonic() + RECOVER_TIMEOUT_S
        while True:
            time.sleep(QUIET_S)
            train.require_running()
            report = ask("report", name, storage)
            if report["failures"] and report["failures"][0]["recovered_s"] is not None:
                return _recovery(report, _step_s(storage / name, killed_at), killed_at, victim, rank)
            if time.monotonic() > end:
                raise RuntimeError(f"not recovered within {RECOVER_TIMEOUT_S:.0f} s: {report['failures']}")


def wait_until_ready(train: Job, name: str, storage: Path, min_step: int) -> Any:
    """The run's status once it trains, a standby is warm and so many steps are done."""
    end = time.monotonic() + START_TIMEOUT_S
    while not _is_ready(status := ask("status", name, storage), min_step):
        train.require_running()
        if time.monotonic() > end:
            raise RuntimeError(f"no warm standby and {min_step} steps within {START_TIMEOUT_S:.0f} s: {status}")
        time.sleep(LOOK_EVERY_S)
    return status


def data_folder(name: str, storage: Path) -> Path:
    """The token shards that this run trains on."""
    return Path(ask("report", name, storage)["data"]["uri"])


def ask(what: str, name: str, storage: Path) -> Any:
    """What `elastictrain status` or `report` tells of the run; None while there is nothing."""
    command = [str(COMMAND), what, name, "--json", "--storage", str(storage)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(answer.stdout) if answer.returncode == 0 else None


def _is_ready(status: Any, min_step: int) -> bool:
    return bool(status and status["status"] == "running" and status["standbys"] and status["step"] >= min_step)


def _step_s(run_folder: Path, killed_at: float) -> float:
    return pace(e.finished_at for e in read_journal(run_folder) if isinstance(e, StepCommitted) and e.at < killed_at)


def _recovery(report: Any, step_s: float, killed_at: float, victim: int, rank: int) -> Recovery:
    generation = report["generations"][1]
    failure = next((f for f in report["failures"] if f["pid"] == victim or f["ranks"] == [rank]), None)
    if failure is None:
        raise RuntimeError(f"process {victim} was killed, and the report tells of others: {report['failures']}")
    began = report["started_at"]
    fault_at = began + failure["at_s"]
    took = generation["phases_s"]
    marks = {"detect": fault_at + failure["detected_s"]}
    for phase in ("fence", "place", "rendezvous", "engine", "restore"):
        marks[phase] = max(marks.values()) + took[phase]
    # orders and replies on their way, buffers, the stream
    marks["set going"] = began + generation["at_s"]
    marks["first step"] = fault_at + failure["recovered_s"]
    return Recovery(
        seconds=marks["first step"] - killed_at,
        steps_lost=failure["lost_steps"],
        phases_s=phases_between(marks, killed_at),
        rank=rank,
        step_s=step_s,
    )
