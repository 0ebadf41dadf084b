"""One worker of Ray Train killed from outside, and the recovery as the workers' own notes and the kernel tell it.

What Ray Train does inside can be seen only at its edges: the survivor's process ends (detected, and the group torn
down), a new process is there, the training function is entered (torch imported, group formed), and then the function's
own notes. The kill comes after two checkpoints, at any place between two of them.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from figures import Recovery, pace, phases_between
from peers.ray_train import Setup, read_notes
from two_nodes import Job, Nodes, running

SCRIPT = Path(__file__).with_name("peers") / "ray_train.py"
START_TIMEOUT_S = 180.0
RECOVER_TIMEOUT_S = 180.0
LOOK_EVERY_S = 0.05

Notes = list[dict[str, Any]]


def recover(
    setup: Setup, folder: Path, ray_address: str, rank: int, offset: int, wait_s: float, nodes: Nodes | None = None
) -> Recovery:
    """Train, kill this rank's process `offset` steps and `wait_s` after a checkpoint, and measure.

    With `nodes`, kill its whole node, or that of another rank if it is the head.
    """
    events, described = Path(setup.events), folder / f"{setup.name}.json"
    described.write_text(json.dumps(asdict(setup)))
    kill_step = 2 * setup.checkpoint_every + offset
    with running([sys.executable, str(SCRIPT), str(described)], folder / f"{setup.name}.log", ray_address) as job:
        before = _wait(events, job, lambda notes: _done(notes) >= kill_step, START_TIMEOUT_S)
        time.sleep(wait_s)
        pids = {note["rank"]: note["pid"] for note in before if note["event"] == "loop"}
        if nodes is not None and nodes.on_head(pids[rank]):
            rank = next(r for r in pids if not nodes.on_head(pids[r]))
        survivor = os.pidfd_open(next(pid for other, pid in pids.items() if other != rank))
        killed_at = time.time()
        if nodes is None:
            os.kill(pids[rank], signal.SIGKILL)
        else:
            nodes.kill_node_of(pids[rank])
        try:
            torn_down_at = _exit_time(survivor)
        finally:
            os.close(survivor)
        old = set(pids.values())
        after = _wait(events, job, lambda notes: _first_step_done(notes, old), RECOVER_TIMEOUT_S)
        return _recovery(after, old, killed_at, torn_down_at, rank)


def _wait(events: Path, job: Job, found: Callable[[Notes], bool], timeout_s: float) -> Notes:
    end = time.monotonic() + timeout_s
    while not found(notes := read_notes(events)):
        job.require_running()
        if time.monotonic() > end:
            raise RuntimeError(f"Ray Train did not come so far within {timeout_s:.0f} s; its last notes: {notes[-4:]}")
        time.sleep(LOOK_EVERY_S)
    return notes


def _exit_time(process: int) -> float:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    if not poll.poll(RECOVER_TIMEOUT_S * 1000):
        raise RuntimeError(f"Ray Train did not tear its group down within {RECOVER_TIMEOUT_S:.0f} s")
    return time.time()


def _done(notes: Notes) -> int:
    return max((note["step"] for note in notes if note["event"] == "step"), default=0)


def _first_step_done(notes: Notes, old: set[int]) -> bool:
    new = [note for note in notes if note["pid"] not in old and note["event"] == "step"]
    return bool(new) and len({note["pid"] for note in new}) == new[0]["world_size"]


def _recovery(notes: Notes, old: set[int], killed_at: float, torn_down_at: float, rank: int) -> Recovery:
    before = [note for note in notes if note["pid"] in old]
    new = [note for note in notes if note["pid"] not in old]

    def last(event: str) -> float:
        firsts: dict[int, float] = {}
        for note in new:
            if note["event"] == event:
                firsts.setdefault(note["pid"], note["at"])
        return max(firsts.values())

    marks = {
        "detect, tear down": torn_down_at,
        "processes": max(psutil.Process(pid).create_time() for pid in {note["pid"] for note in new}),
        "imports, group": last("loop"),
        "import deepspeed": last("imported"),
        "engine": last("engine"),
        "restore": last("restored"),
        "first step": last("step"),
    }
    resumed_from = next(note["step"] for note in new if note["event"] == "restored")
    return Recovery(
        seconds=marks["first step"] - killed_at,
        steps_lost=_done(before) - resumed_from,
        phases_s=phases_between(marks, killed_at),
        rank=rank,
        step_s=pace(note["at"] for note in before if note["event"] == "step" and note["rank"] == rank),
    )
