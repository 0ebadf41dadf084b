"""A fault that strikes elastictrain, or a node that comes, and what its own report and journal say of it.

It comes once a warm standby is there and training is well under way. Phases and lost steps are those of the report;
the times at which steps ended come from the journal.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from elastictrain_run import COMMAND, ask, wait_until_ready
from figures import Recovery, Unrecovered, pace, phases_between
from trial import Trial
from two_nodes import Nodes, local_nodes, running

from elastictrain.events import GenerationStarted, StepCommitted, WorkerStarted
from elastictrain.tracking.journal import read_journal

QUIET_S = 3.0
"""Nobody asks for status or report for so long around the fault: a question costs half a second of CPU."""
PHASES = ("fence", "place", "rendezvous", "engine", "restore")


def strike(trial: Trial, job: Path, overrides: list[str], folder: Path, storage: Path) -> Recovery | Unrecovered:
    """Train on nodes of its own, do what the trial says, and measure; the run's name is the trial's."""
    settings = [
        *overrides,
        f"run.name={trial.name}",
        f"run.storage={storage}",
        f"parallel.zero_stage={trial.zero_stage}",
    ]
    command = [str(COMMAND), "train", str(job), *settings]
    with (
        local_nodes(trial.num_nodes) as nodes,
        running(command, folder / "elastictrain.log", nodes.address) as train,
    ):
        status = wait_until_ready(train, trial.name, storage, 2 * trial.checkpoint_every)
        time.sleep(QUIET_S + trial.wait_s)
        rank, old = trial.rank, status["generation"]
        if trial.fault == "join":
            begun = time.time()
            nodes.add()
            marks = {"node up": time.time()}
        else:
            rank, begun = _kill(trial, nodes, {w["rank"]: w["pid"] for w in status["workers"]})
            marks = {}
        end = time.monotonic() + trial.limit_s
        while True:
            time.sleep(QUIET_S)
            train.require_running()
            if _first_step(storage / trial.name, old):
                break
            if time.monotonic() > end:
                return Unrecovered(time.time() - begun, f"no step in a new group: {ask('status', trial.name, storage)}")
        report = ask("report", trial.name, storage)
        if trial.fault == "join":
            return _joined(storage / trial.name, report, old, begun, rank, marks)
        return _recovered(storage / trial.name, report, old, begun, rank)


def _kill(trial: Trial, nodes: Nodes, pids: dict[int, int]) -> tuple[int, float]:
    """The rank whose process or node was killed, and when."""
    rank = trial.rank
    if trial.fault == "node" and nodes.on_head(pids[rank]):
        rank = next(r for r in pids if not nodes.on_head(pids[r]))
    begun = time.time()
    if trial.fault == "worker":
        os.kill(pids[rank], signal.SIGKILL)
    else:
        nodes.kill_node_of(pids[rank])
    return rank, begun


def _first_step(run: Path, old: int) -> StepCommitted | None:
    """The first of a generation after this one."""
    return next((e for e in read_journal(run) if isinstance(e, StepCommitted) and e.generation > old), None)


def _recovered(run: Path, report: Any, old: int, begun: float, rank: int) -> Recovery:
    failures = [f for f in report["failures"] if f["generation"] == old]
    failure = next((f for f in failures if rank in f["ranks"]), None)
    if failure is None:
        raise RuntimeError(f"rank {rank} was killed, and the report tells of others: {failures}")
    detected_at = report["started_at"] + failure["at_s"] + failure["detected_s"]
    return _measured(run, old, begun, {"detect": detected_at}, failure["lost_steps"], rank)


def _joined(run: Path, report: Any, old: int, begun: float, rank: int, marks: dict[str, float]) -> Recovery:
    events = list(read_journal(run))
    last = max(e.finished_at for e in events if isinstance(e, StepCommitted) and e.generation == old)
    warm = [e.at for e in events if isinstance(e, WorkerStarted) and begun < e.at < last]
    marks["worker warm"] = max([*warm, *marks.values()])
    marks["last step"] = max(last, *marks.values())
    return _measured(run, old, begun, marks, report["lost_steps"], rank)


def _measured(run: Path, old: int, begun: float, marks: dict[str, float], lost: int, rank: int) -> Recovery:
    """`marks` tells what happened before the old group was fenced."""
    events = list(read_journal(run))
    before = [e.finished_at for e in events if isinstance(e, StepCommitted) and e.generation <= old]
    first = _first_step(run, old)
    assert first is not None
    new = next(e for e in events if isinstance(e, GenerationStarted) and e.index == first.generation)
    for phase in PHASES:
        marks[phase] = max(marks.values()) + new.phases_s[phase]
    # orders and replies on their way, buffers, the stream
    marks["set going"] = new.at
    marks["first step"] = first.finished_at
    return Recovery(
        seconds=first.finished_at - begun,
        pause_s=first.finished_at - before[-1],
        steps_lost=lost,
        phases_s=phases_between(marks, begun),
        rank=rank,
        world_size=new.world_size,
        step_s=pace(at for at in before if at < begun),
    )
