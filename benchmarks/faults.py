"""The cases in which something is killed or comes: elastictrain and its peers bear the same, in turns."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import elastictrain_run
import psutil
import strike_elastictrain
import strike_peer
from figures import Recovery, Unrecovered, summary
from peers.notes import Setup
from strike_peer import Peer
from trial import WORLD_SIZE, Fault, Trial, processes_of

from elastictrain.config import TrainConfig
from elastictrain.runtime.home import settled

NEVER_ENDING = 1_000_000
"""Steps: all train until they are stopped."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all cases of one go have in common."""

    job: Path
    folder: Path
    runs: int
    checkpoint_every: int
    limit_s: float
    seed: int
    spare_nodes: int

    @property
    def overrides(self) -> list[str]:
        """Beside the job's own settings."""
        fixed = ["train.compile=false", "faults=[]"]  # the peers' model, as it is
        return [f"train.steps={NEVER_ENDING}", *fixed, f"checkpoint.every={self.checkpoint_every}"]


def measure(bench: Bench, fault: Fault, zero_stage: int, peers: Sequence[Peer]) -> dict[str, Any]:
    """All runs of one case, in turns."""
    moments = random.Random(bench.seed)
    ours: list[Recovery | Unrecovered] = []
    theirs: dict[str, list[Recovery | Unrecovered]] = {peer.key: [] for peer in peers}
    for number in range(bench.runs):
        trial = Trial(
            name=f"{fault}-zero{zero_stage}-{number}",
            fault=fault,
            zero_stage=zero_stage,
            rank=1 if fault == "join" else (number + 1) % WORLD_SIZE,
            offset=moments.randrange(bench.checkpoint_every),
            wait_s=moments.random(),
            checkpoint_every=bench.checkpoint_every,
            limit_s=bench.limit_s,
            spare_nodes=bench.spare_nodes if fault == "node" else 0,
        )
        ours.append(_in_a_folder(bench.folder / trial.name, partial(_elastictrain, bench, trial)))
        for peer in peers:
            # who does not come back takes the whole limit to show it, and once is enough
            if number == 0 or any(isinstance(run, Recovery) for run in theirs[peer.key]):
                folder = bench.folder / f"{trial.name}-{peer.key}"
                theirs[peer.key].append(_in_a_folder(folder, partial(_peer, bench, trial, peer)))
    return {
        "case": fault,
        "zero_stage": zero_stage,
        "elastictrain": summary(ours),
        "peers": {peer.key: {"title": peer.title, **summary(theirs[peer.key])} for peer in peers},
    }


def _elastictrain(bench: Bench, trial: Trial, folder: Path) -> Recovery | Unrecovered:
    return strike_elastictrain.strike(trial, bench.job, bench.overrides, folder, bench.folder / "runs")


def _peer(bench: Bench, trial: Trial, peer: Peer, folder: Path) -> Recovery | Unrecovered:
    return strike_peer.strike(peer, trial, setup_of(bench, trial, peer, folder), folder)


def _in_a_folder(folder: Path, strike: Callable[[Path], Recovery | Unrecovered]) -> Recovery | Unrecovered:
    """One run; one that fails is told, and hours of others go on."""
    folder.mkdir()
    begun = time.monotonic()
    with processes_of(folder):
        try:
            run = strike(folder)
        except (RuntimeError, OSError, psutil.Error) as error:
            run = Unrecovered(time.monotonic() - begun, str(error))
    _tell(folder.name, run)
    return run


def setup_of(bench: Bench, trial: Trial, peer: Peer, folder: Path) -> Setup:
    """The peer's job, on the data that elastictrain has prepared."""
    settings = [*bench.overrides, f"parallel.zero_stage={trial.zero_stage}"]
    return Setup(
        name=folder.name,
        engine="deepspeed" if peer.sharded else "ddp",
        config=settled(TrainConfig.load(bench.job, settings)).to_dict(),
        data_folder=str(elastictrain_run.data_folder(trial.name, bench.folder / "runs")),
        storage=str(folder / "storage"),
        checkpoint_every=bench.checkpoint_every,
        events=str(folder / "notes.jsonl"),
    )


def _tell(who: str, run: Recovery | Unrecovered) -> None:
    match run:
        case Recovery():
            what = (
                f"{run.seconds:.2f} s, pause {run.pause_s:.2f} s, steps lost {run.steps_lost}, "
                f"goes on with {run.world_size}"
            )
        case Unrecovered():
            what = f"not back after {run.waited_s:.0f} s: {run.problem}"
    print(f"{who}: {what}", file=sys.stderr, flush=True)
