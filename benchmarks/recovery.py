"""How long training stands still when a worker is killed: elastictrain beside Ray Train, in one go on one machine.

Two local Ray nodes, the same for both. In turns, each trains the same model on the same data with the same DeepSpeed
ZeRO-1; then one rank's process gets SIGKILL, from outside, by pid, or with `--fault node` everything on its node, while
a third node has room for the rank. Measured is the time from the kill until every rank of the new group has done its
first step, and how many completed steps had to be done again.

    python benchmarks/recovery.py                                     a table; 5 to 8 minutes
    python benchmarks/recovery.py --runs 5 --json --out result.json   one JSON object
    python benchmarks/recovery.py --peers none                        elastictrain alone
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import kill_elastictrain
import kill_ray_train
import machine
from figures import Recovery, summary, table
from peers.ray_train import Setup
from two_nodes import local_nodes

from elastictrain.config import TrainConfig

JOB = Path(__file__).resolve().parents[1] / "jobs" / "llm_tiny.yaml"
WORLD_SIZE = 2
NEVER_ENDING = 1_000_000
"""Steps: both train until they are stopped."""
PEERS = {"ray_train": "Ray Train", "none": ""}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--fault",
        choices=["worker", "node"],
        default="worker",
        help="SIGKILL to one rank's process (default), or to all of its node, of three nodes with room for a rank each",
    )
    parser.add_argument("--runs", type=int, default=3, help="faults per platform (default 3)")
    parser.add_argument("--peers", choices=list(PEERS), default="ray_train", help="whom to compare with")
    parser.add_argument("--checkpoint-every", type=int, default=10, help="steps between durable checkpoints, in both")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which the kills come")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON object there too")
    arguments = parser.parse_args()
    result = measure(arguments)
    text = json.dumps(result, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text if arguments.json else told(result))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All runs, in turns."""
    found = machine.describe()
    overrides = [f"train.steps={NEVER_ENDING}", "faults=[]", f"checkpoint.every={arguments.checkpoint_every}"]
    config = TrainConfig.load(JOB, overrides).to_dict()
    moments = random.Random(arguments.seed)
    ours: list[Recovery] = []
    theirs: list[Recovery] = []
    folder = Path(tempfile.mkdtemp(prefix="recovery-"))
    try:
        whole_nodes = arguments.fault == "node"
        with local_nodes(folder, WORLD_SIZE + whole_nodes) as cluster:
            address, nodes = cluster.address, cluster if whole_nodes else None
            for number in range(arguments.runs):
                rank = (number + 1) % WORLD_SIZE
                offset, wait_s = moments.randrange(arguments.checkpoint_every), moments.random()
                min_step = 2 * arguments.checkpoint_every
                name = f"run-{number}"
                ours.append(
                    kill_elastictrain.recover(name, JOB, overrides, folder, address, rank, min_step, wait_s, nodes)
                )
                cluster.replace_dead()
                _progress("elastictrain", number, ours[-1])
                if arguments.peers == "none":
                    continue
                setup = Setup(
                    name=f"ray-train-{number}",
                    config=config,
                    data_folder=str(kill_elastictrain.data_folder(name, folder / "runs")),
                    storage=str(folder / "ray-train"),
                    checkpoint_every=arguments.checkpoint_every,
                    events=str(folder / f"ray-train-{number}.jsonl"),
                )
                theirs.append(kill_ray_train.recover(setup, folder, address, rank, offset, wait_s, nodes))
                cluster.replace_dead()
                _progress("Ray Train", number, theirs[-1])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {"machine": found, "fault": arguments.fault, "checkpoint_every": arguments.checkpoint_every}
    result["elastictrain"] = summary(ours)
    result["ray_train"] = summary(theirs) if theirs else None
    result["ratio"] = result["ray_train"]["median_s"] / result["elastictrain"]["median_s"] if theirs else None
    return result


def _progress(who: str, number: int, run: Recovery) -> None:
    print(f"run {number + 1}, {who}: {run.seconds:.2f} s, steps lost {run.steps_lost}", file=sys.stderr, flush=True)


def told(result: dict[str, Any]) -> str:
    """The result as tables for people."""
    measured = {"elastictrain": result["elastictrain"], "Ray Train": result["ray_train"]}
    rows, splits = [], []
    for who, found in measured.items():
        if found is None:
            continue
        seconds = " ".join(f"{run['seconds']:.2f}" for run in found["runs"])
        lost = " ".join(str(run["steps_lost"]) for run in found["runs"])
        step_s = found["runs"][-1]["step_s"]
        rows.append([who, f"{found['median_s']:.2f}", seconds, lost, f"{step_s:.2f}"])
        split = ", ".join(f"{phase} {took:.2f}" for phase, took in found["median_phases_s"].items())
        splits.append(f"{who}: {split}")
    header = [f"SIGKILL of a {result['fault']}", "median s", "runs s", "steps lost", "one step s"]
    ratio = [] if result["ratio"] is None else [f"ratio of the medians: {result['ratio']:.1f}"]
    parts = [
        machine.line(result["machine"]),
        "",
        table(header, rows),
        "",
        *ratio,
        "median seconds of each phase:",
        *splits,
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    main()
