"""What faults, resizes and durable checkpoints cost: elastictrain beside its peers, in one go on one machine.

Two local nodes, the same for all; in turns, each platform trains the same model on the same data. Ray Train trains with
DeepSpeed ZeRO as elastictrain does (and with DDP where its ZeRO does not come back), torchrun elastic and torchft with
DDP. One fault a trial, from outside:

    worker      SIGKILL of one rank's process
    node        SIGKILL of all of a node; what is left goes on
    join        a job on one node gets a second one
    checkpoint  no fault: a durable checkpoint of a larger model every few steps

    python benchmarks/recovery.py --fault worker                      one case, 3 runs; 12 minutes
    python benchmarks/recovery.py --fault worker --peers none         elastictrain alone; 2 minutes
    python benchmarks/recovery.py --fault node --zero 1,2,3 --peers ray_train
    python benchmarks/recovery.py --fault all --runs 5                the whole table; 2.5 hours on two cores
    python benchmarks/recovery.py --fault all --json --out result.json
    python benchmarks/recovery.py --job benchmarks/waiting.yaml       steps that leave the processors free
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoint_stall
import faults
import machine
from peers import chosen
from told import told

JOB = Path(__file__).resolve().parents[1] / "jobs" / "llm_tiny.yaml"
CASES = ("worker", "node", "join", "checkpoint")


def main() -> None:
    """Parse, measure, print."""
    arguments = _parse()
    result = measure(arguments)
    print(json.dumps(result, indent=2) if arguments.json else told(result))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", choices=[*CASES, "all"], default="worker", help="the case (default worker)")
    parser.add_argument(
        "--zero", type=_stages, metavar="N,N", help="ZeRO stages (default 1; of worker in `all`: 1,2,3)"
    )
    parser.add_argument(
        "--job",
        type=Path,
        default=JOB,
        metavar="FILE",
        help="what all train, but for the checkpoint's larger model (default jobs/llm_tiny.yaml)",
    )
    parser.add_argument("--runs", type=int, default=3, help="faults per platform (default 3)")
    parser.add_argument(
        "--peers",
        default="all",
        help=f"whom to compare with: {', '.join(chosen.NAMES)}, several with commas, all (default) or none",
    )
    parser.add_argument("--checkpoint-every", type=int, default=10, help="steps between durable checkpoints, in all")
    parser.add_argument("--spare-node", action="store_true", help="a third node has room for the ranks of a lost one")
    parser.add_argument(
        "--spare-core", action="store_true", help="checkpoint: ranks share a core, the rest has another"
    )
    parser.add_argument("--limit", type=float, default=180.0, metavar="S", help="wait so long for a step (default 180)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which the faults come")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON object there too")
    arguments = parser.parse_args()
    try:
        arguments.peers = chosen.names(arguments.peers)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def _stages(text: str) -> list[int]:
    stages = [int(stage) for stage in text.split(",")]
    if not set(stages) <= {1, 2, 3}:
        raise argparse.ArgumentTypeError(f"{text!r} holds a ZeRO stage that is none of 1, 2, 3")
    return stages


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All cases that were asked for; `--out` has each as soon as it is measured."""
    found = machine.describe()
    folder = Path(tempfile.mkdtemp(prefix="recovery-"))
    cases: tuple[Any, ...] = CASES if arguments.fault == "all" else (arguments.fault,)
    bench = faults.Bench(
        job=arguments.job,
        folder=folder,
        runs=arguments.runs,
        checkpoint_every=arguments.checkpoint_every,
        limit_s=arguments.limit,
        seed=arguments.seed,
        spare_nodes=int(arguments.spare_node),
    )
    measured: list[dict[str, Any]] = []
    result = {
        "machine": found,
        "job": arguments.job.name,
        "checkpoint_every": arguments.checkpoint_every,
        "cases": measured,
    }
    try:
        for case in cases:
            stages = arguments.zero or ([1, 2, 3] if arguments.fault == "all" and case == "worker" else [1])
            for stage in stages:
                peers = chosen.for_case(case, arguments.peers, sharded_only=stage != stages[0])
                if case == "checkpoint":
                    of_larger = replace(bench, job=JOB)
                    measured.append(checkpoint_stall.measure(of_larger, stage, peers, arguments.spare_core))
                else:
                    measured.append(faults.measure(bench, case, stage, peers))
                if arguments.out:
                    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return result


if __name__ == "__main__":
    main()
