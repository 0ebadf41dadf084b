"""A fault that strikes a peer, or a node that comes, and what the notes of its ranks tell of it.

It comes after two checkpoints, at any place between two of them. The peer is back when every rank of a new group has
done a step. What it does inside can be seen at its edges only: a survivor's process ends (detected, and the group torn
down), new processes are there, the training function is entered (torch imported, group formed), and then the
function's own notes.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from figures import Recovery, Unrecovered, pace, phases_between
from peers.notes import Note, Setup, read_notes
from trial import WORLD_SIZE, Trial

START_TIMEOUT_S = 180.0
LOOK_EVERY_S = 0.05
PHASES = {"imports, group": "loop", "import engine": "imported", "engine": "engine", "restore": "restored"}
"""By the note that ends it."""


class PeerJob(Protocol):
    """A job under way on nodes of its own."""

    def require_running(self) -> None:
        """Raise RuntimeError with the end of its output when it has ended."""

    def on_head(self, pid: int) -> bool:
        """Whether this rank is on the node that nobody may kill."""

    def kill_node_of(self, pid: int) -> None:
        """SIGKILL to all of that node."""

    def add_node(self) -> None:
        """One more; returns when it is up, or starting."""


class Peer(Protocol):
    """A platform to compare with."""

    @property
    def key(self) -> str:
        """Its name in results."""

    @property
    def title(self) -> str:
        """Its name for people."""

    @property
    def sharded(self) -> bool:
        """Whether it trains with ZeRO; else each rank has the whole state."""

    def begin(self, setup: Setup, folder: Path, num_nodes: int) -> AbstractContextManager[PeerJob]:
        """Start the job on so many nodes; end it, and them, with the block."""


def strike(peer: Peer, trial: Trial, setup: Setup, folder: Path) -> Recovery | Unrecovered:
    """Train on nodes of its own, do what the trial says, and measure."""
    events = Path(setup.events)
    with peer.begin(setup, folder, trial.num_nodes) as job:
        _start(events, job, trial)
        time.sleep(trial.wait_s)
        pids = _newest_group(read_notes(events))
        rank, old = trial.rank, {_group(note) for note in read_notes(events)}
        if trial.fault == "node" and job.on_head(pids[rank]):
            rank = next(r for r in pids if not job.on_head(pids[r]))
        survivor = _Exit(next(pid for other, pid in pids.items() if other != rank))
        begun = time.time()
        marks: dict[str, float] = {}
        match trial.fault:
            case "worker":
                os.kill(pids[rank], signal.SIGKILL)
            case "node":
                job.kill_node_of(pids[rank])
            case "join":
                job.add_node()
                marks["node up"] = time.time()
        world_size = WORLD_SIZE if trial.fault == "join" else None
        ended = _wait(events, job, lambda notes: _back(notes, old, world_size), trial.limit_s, survivor.look)
        notes = read_notes(events)
        if ended is not None:
            return Unrecovered(time.time() - begun, _last_words(notes, old) or ended)
        return _recovery(notes, _first_steps(notes, old, world_size), begun, marks, survivor.at, rank)


def described(setup: Setup, folder: Path) -> str:
    """Path of a file with the job, for the peer's processes."""
    path = folder / "job.json"
    path.write_text(json.dumps(asdict(setup)))
    return str(path)


def done(notes: list[Note]) -> int:
    """The newest step that any rank has done."""
    return max((note["step"] for note in notes if note["event"] == "step"), default=0)


def _start(events: Path, job: PeerJob, trial: Trial) -> None:
    step = 2 * trial.checkpoint_every + trial.offset

    def trains(notes: list[Note]) -> bool:
        steps = [note for note in notes if note["event"] == "step"]
        return done(steps) >= step and steps[-1]["world_size"] == trial.num_ranks

    problem = _wait(events, job, trains, START_TIMEOUT_S)
    if problem:
        last = read_notes(events)[-4:]
        raise RuntimeError(f"the peer did not do step {step} with {trial.num_ranks} ranks: {problem}; it noted {last}")


def _wait(
    events: Path,
    job: PeerJob,
    found: Callable[[list[Note]], bool],
    timeout_s: float,
    look: Callable[[], None] = lambda: None,
) -> str | None:
    """None once it is found in the notes; else why it never will be."""
    end = time.monotonic() + timeout_s
    while not found(read_notes(events)):
        try:
            job.require_running()
        except RuntimeError as error:
            return str(error)
        if time.monotonic() > end:
            return f"nothing within {timeout_s:.0f} s"
        look()
        time.sleep(LOOK_EVERY_S)
    return None


class _Exit:
    """When a process ended, to 0.05 s; None while it lives. Its number may be another's by then."""

    def __init__(self, pid: int) -> None:
        self._process = os.pidfd_open(pid)
        self._poll = select.poll()
        self._poll.register(self._process, select.POLLIN)
        self.at: float | None = None

    def look(self) -> None:
        if self.at is None and self._poll.poll(0):
            self.at = time.time()
            os.close(self._process)


def _group(note: Note) -> Hashable:
    return ("quorum", note["group"]) if "group" in note else note["pid"]


def _newest_group(notes: list[Note]) -> dict[int, int]:
    """Process of each rank."""
    return {note["rank"]: note["pid"] for note in notes if note["event"] == "step"}


def _first_steps(notes: list[Note], old: set[Hashable], world_size: int | None = None) -> list[Note]:
    """The first step of each rank of the new group; with `world_size`, of a group of that size."""
    firsts: dict[int, Note] = {}
    for note in notes:
        if (
            note["event"] == "step"
            and _group(note) not in old
            and note["world_size"] == (world_size or note["world_size"])
        ):
            firsts.setdefault(note["rank"], note)
    return list(firsts.values())


def _back(notes: list[Note], old: set[Hashable], world_size: int | None) -> bool:
    firsts = _first_steps(notes, old, world_size)
    return bool(firsts) and len(firsts) >= firsts[0]["world_size"]


def _last_words(notes: list[Note], old: set[Hashable]) -> str:
    failed = [note["problem"] for note in notes if note["event"] == "failed" and _group(note) not in old]
    return f"{failed[-1]} ({len(failed)} times)" if failed else ""


def _recovery(
    notes: list[Note],
    firsts: list[Note],
    begun: float,
    marks: dict[str, float],
    torn_down_at: float | None,
    rank: int,
) -> Recovery:
    back_at = min(note["at"] for note in firsts)
    before = [note for note in notes if note["event"] == "step" and note["at"] < back_at]
    pids = {note["pid"] for note in firsts}
    if torn_down_at is not None:
        marks["detect, tear down"] = torn_down_at
        marks["processes"] = max(note["born"] for note in firsts)
        for phase, event in PHASES.items():
            told = [note["at"] for note in notes if note["event"] == event and note["pid"] in pids]
            marks[phase] = max(told, default=marks["processes"])
    ended = max(note["at"] for note in firsts)
    return Recovery(
        seconds=ended - begun,
        pause_s=ended - max(note["at"] for note in before),
        steps_lost=done(before) - (min(note["step"] for note in firsts) - 1),
        phases_s=phases_between({**marks, "first step": ended}, begun),
        rank=rank,
        world_size=firsts[0]["world_size"],
        step_s=pace(note["at"] for note in before if note["rank"] == 0 and note["at"] < begun),
    )
