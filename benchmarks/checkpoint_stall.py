"""How long training stands still for a durable checkpoint: elastictrain beside DeepSpeed's synchronous save.

Both train a larger model than the other cases do, so that there is something to write, and make it durable every few
steps, on the same disk. Under Ray Train a rank saves and reports before it goes on; counted is the time from the end of
the step to the return of `report`. elastictrain writes from its keepers' memory while training goes on. Counted is all
by which the steps meanwhile came later than the others, be it that a rank waited or that the write took processor time
from it: with as many ranks as cores, it does.
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import elastictrain_run
import psutil
import strike_peer
from faults import Bench
from figures import Stall, stalls_of, summary_of_stalls
from peers.notes import Note, Setup, read_notes
from strike_peer import Peer
from trial import WORLD_SIZE, processes_of
from two_nodes import local_nodes, running

from elastictrain.config import TrainConfig
from elastictrain.events import CheckpointWritten, StepCommitted
from elastictrain.tracking.journal import read_journal

LARGER = ["model.hidden_size=512", "model.num_layers=6", "model.num_heads=8", "train.global_batch=8"]
LARGER += ["train.micro_batch=4", "data.seq_len=64"]
"""On jobs/llm_tiny.yaml: 212 MB with both moments."""
PER_RUN = 3
"""Checkpoints for each run that was asked for; the first of all is left out."""
TIMEOUT_S = 600.0


def measure(bench: Bench, zero_stage: int, peers: Sequence[Peer], spare_core: bool = False) -> dict[str, Any]:
    """The durable checkpoints of one run of each platform."""
    wanted, name = PER_RUN * bench.runs + 1, f"checkpoint-zero{zero_stage}"
    settings = [*bench.overrides, *LARGER, f"parallel.zero_stage={zero_stage}"]
    ours, num_bytes = _ours(bench, name, settings, wanted, spare_core)
    _tell("elastictrain", ours)
    theirs = {}
    for peer in peers:
        theirs[peer.key] = _theirs(bench, name, settings, peer, wanted)
        _tell(peer.title, theirs[peer.key])
    return {
        "case": "checkpoint",
        "zero_stage": zero_stage,
        "num_bytes": num_bytes,
        "spare_core": spare_core,
        "elastictrain": summary_of_stalls(ours),
        "peers": {peer.key: {"title": peer.title, **summary_of_stalls(theirs[peer.key])} for peer in peers},
    }


def _ours(bench: Bench, name: str, settings: list[str], wanted: int, spare_core: bool) -> tuple[list[Stall], int]:
    folder, storage = bench.folder / name, bench.folder / "runs"
    command = [str(elastictrain_run.COMMAND), "train", str(bench.job), *settings]
    command += [f"run.name={name}", f"run.storage={storage}"]
    with (
        processes_of(folder),
        local_nodes(WORLD_SIZE) as nodes,
        running(command, folder / "elastictrain.log", nodes.address) as train,
    ):
        status = elastictrain_run.wait_until_ready(train, name, storage, bench.checkpoint_every)
        if spare_core:
            _share_a_core([worker["pid"] for worker in status["workers"]])
        begun = time.time()
        # the last of them is complete only with the steps after it
        _wait(lambda: len(_written(storage / name, begun)) > wanted, train.require_running)
        num_bytes = _written(storage / name, begun)[-1].num_bytes
    written = {e.step: (e.at, e.seconds) for e in _written(storage / name, begun)}
    steps = [e for e in read_journal(storage / name) if isinstance(e, StepCommitted) and e.begun_at > begun]
    waits_s = {e.step: e.snapshot_stall_s for e in steps}
    return stalls_of({e.step: e.finished_at for e in steps}, waits_s, written)[:wanted], num_bytes


def _written(run: Path, since: float) -> list[CheckpointWritten]:
    return [e for e in read_journal(run) if isinstance(e, CheckpointWritten) and e.at - e.seconds > since]


def _theirs(bench: Bench, name: str, settings: list[str], peer: Peer, wanted: int) -> list[Stall]:
    folder = bench.folder / f"{name}-{peer.key}"
    folder.mkdir()
    setup = Setup(
        name=folder.name,
        engine="deepspeed",
        config=TrainConfig.load(bench.job, settings).to_dict(),
        data_folder=str(elastictrain_run.data_folder(name, bench.folder / "runs")),
        storage=str(folder / "storage"),
        checkpoint_every=bench.checkpoint_every,
        events=str(folder / "notes.jsonl"),
    )
    with processes_of(folder), peer.begin(setup, folder, WORLD_SIZE) as job:
        _wait(lambda: len(_saves(read_notes(Path(setup.events)))) > wanted, job.require_running)
        return _saves(read_notes(Path(setup.events)))[1:]


def _saves(notes: list[Note]) -> list[Stall]:
    """From the last rank's end of the step to the last rank's return, of those that all ranks have told of."""
    at: dict[tuple[str, int], list[float]] = defaultdict(list)
    for note in notes:
        at[note["event"], note["step"]].append(note["at"])
    took = [
        max(ends) - max(at["step", step])
        for (event, step), ends in sorted(at.items())
        if event == "checkpoint" and len(ends) == WORLD_SIZE
    ]
    return [Stall(stalled_s=seconds, waited_s=seconds, write_s=seconds) for seconds in took]


def _wait(enough: Callable[[], bool], require_running: Callable[[], None]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not enough():
        require_running()
        if time.monotonic() > end:
            raise RuntimeError(f"not enough checkpoints within {TIMEOUT_S:.0f} s; ask for fewer --runs")
        time.sleep(strike_peer.LOOK_EVERY_S * 20)


def _share_a_core(pids: Sequence[int]) -> None:
    core = min(os.sched_getaffinity(0))
    for pid in pids:
        for thread in psutil.Process(pid).threads():
            os.sched_setaffinity(thread.id, {core})


def _tell(who: str, stalls: Sequence[Stall]) -> None:
    seconds = " ".join(f"{stall.stalled_s:.3f}" for stall in stalls)
    print(f"checkpoint, {who}: training came later by {seconds} s", file=sys.stderr, flush=True)
