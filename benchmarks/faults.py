"""The cases in which something is killed or comes: elastictrain and its peers bear the same, in turns."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import elastictrain_run
import strike_elastictrain
import strike_peer
from figures import Recovery, Unrecovered, summary
from peers.notes import Setup
from strike_peer import Peer
from trial import WORLD_SIZE, Fault, Trial, processes_of

from elastictrain.config import TrainConfig

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
        return [f"train.steps={NEVER_ENDING}", "faults=[]", f"checkpoint.every={self.checkpoint_every}"]


def measure(bench: Bench, fault: Fault, zero_stage: int, peers: Sequence[Peer]) -> dict[str, Any]:
    """All runs of one case, in turns."""
    moments = random.Random(bench.seed)
    ours: list[Recovery] = []
    theirs: dict[str, list[Recovery | Unrecovered]] = {peer.key: [] for peer in peers}
    for number in range(bench.runs):
        trial = Trial(
            name=f"{fault}-zero{zero_stage}-{number}",
            fault=fault,
            zero_stage=zero_stage,
            rank=0 if fault == "join" else (number + 1) % WORLD_SIZE,
            offset=moments.randrange(bench.checkpoint_every),
            wait_s=moments.random(),
            checkpoint_every=bench.checkpoint_every,
            limit_s=bench.limit_s,
            spare_nodes=bench.spare_nodes if fault == "node" else 0,
        )
        folder, storage = bench.folder / trial.name, bench.folder / "runs"
        with processes_of(folder):
            ours.append(strike_elastictrain.strike(trial, bench.job, bench.overrides, folder, storage))
        _tell("elastictrain", trial, ours[-1])
        for peer in peers:
            # where ZeRO does not come back it takes the whole limit to see that, and once is enough
            if any(isinstance(run, Unrecovered) for run in theirs[peer.key]):
                continue
            folder = bench.folder / f"{trial.name}-{peer.key}"
            folder.mkdir()
            with processes_of(folder):
                theirs[peer.key].append(strike_peer.strike(peer, trial, setup_of(bench, trial, peer, folder), folder))
            _tell(peer.title, trial, theirs[peer.key][-1])
    return {
        "case": fault,
        "zero_stage": zero_stage,
        "elastictrain": summary(ours),
        "peers": {peer.key: {"title": peer.title, **summary(theirs[peer.key])} for peer in peers},
    }


def setup_of(bench: Bench, trial: Trial, peer: Peer, folder: Path) -> Setup:
    """The peer's job, on the data that elastictrain has prepared."""
    settings = [*bench.overrides, f"parallel.zero_stage={trial.zero_stage}"]
    return Setup(
        name=folder.name,
        engine="deepspeed" if peer.sharded else "ddp",
        config=TrainConfig.load(bench.job, settings).to_dict(),
        data_folder=str(elastictrain_run.data_folder(trial.name, bench.folder / "runs")),
        storage=str(folder / "storage"),
        checkpoint_every=bench.checkpoint_every,
        events=str(folder / "notes.jsonl"),
    )


def _tell(who: str, trial: Trial, run: Recovery | Unrecovered) -> None:
    match run:
        case Recovery():
            what = (
                f"{run.seconds:.2f} s, pause {run.pause_s:.2f} s, steps lost {run.steps_lost}, "
                f"goes on with {run.world_size}"
            )
        case Unrecovered():
            what = f"not back after {run.waited_s:.0f} s: {run.problem}"
    print(f"{trial.name}, {who}: {what}", file=sys.stderr, flush=True)
