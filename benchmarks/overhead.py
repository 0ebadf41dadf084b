"""What fault tolerance costs while nothing fails: elastictrain beside a bare DeepSpeed loop, in turns on one machine.

elastictrain runs as a user runs it: its command line, Ray actors on two local nodes, a warm standby, a snapshot of the
whole state after each step with its replica on the other node, a durable checkpoint every 50 steps, the journal and
MLflow. The bare loop is two processes that train with the same DeepSpeed and do nothing else (bare_loop.py). Both take
the same steps on the same samples, and their losses are compared bit for bit. When both are warm and the standby is
up, they take turns of a few seconds (turns.py): a round is one turn of each. The ratio of their steps/s is the median
over the rounds that other work on the machine disturbed least. While the bare loop has its turn nothing else runs, of
elastictrain or of Ray.

    python benchmarks/overhead.py                                     a table; about 4 minutes
    python benchmarks/overhead.py --rounds 40 --json                  one JSON object
    python benchmarks/overhead.py --spare-core                        ranks on one core, all else on another
    python benchmarks/overhead.py train.global_batch=64               with other settings than jobs/llm_tiny.yaml's
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import bare_loop
import machine
import psutil
from elastictrain_run import COMMAND, ask, data_folder, wait_until_ready
from figures import table
from processor_time import between, used
from turns import take_turns
from two_nodes import Job, running, two_nodes

from elastictrain.config import TrainConfig
from elastictrain.events import StepCommitted
from elastictrain.tracking.journal import read_journal

JOB = Path(__file__).resolve().parents[1] / "jobs" / "llm_tiny.yaml"
WORLD_SIZE = 2
NAME = "overhead"
BARE = "bare loop"
NEVER_ENDING = 1_000_000
START_TIMEOUT_S = 120.0


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="rounds that count (default 20)")
    parser.add_argument("--turn", type=float, default=5.0, metavar="S", help="seconds of a turn (default 5)")
    parser.add_argument("--steps", type=int, default=50, help="steps of warm-up before the turns (default 50)")
    parser.add_argument("--spare-core", action="store_true", help="all ranks share a core, another is left to the rest")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON object there too")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change in both")
    arguments = parser.parse_args()
    result = measure(arguments)
    text = json.dumps(result, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text if arguments.json else told(result))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start both, let them take turns, compare."""
    found = machine.describe()
    settings = [*arguments.overrides, "faults=[]", f"train.steps={NEVER_ENDING}"]
    folder = Path(tempfile.mkdtemp(prefix="overhead-"))
    storage, lines = folder / "runs", folder / "bare"
    lines.mkdir()
    train = [str(COMMAND), "train", str(JOB), *settings, f"run.name={NAME}", f"run.storage={storage}"]
    try:
        _prepare(train, folder / "prepare.log")
        with two_nodes(folder) as address, running(train, folder / "elastictrain.log", address) as ours:
            wait_until_ready(ours, NAME, storage, arguments.steps)
            job = bare_loop.Setup(
                TrainConfig.load(JOB, settings).to_dict(), str(data_folder(NAME, storage)), WORLD_SIZE, str(lines)
            )
            described = folder / "bare.json"
            described.write_text(json.dumps(asdict(job)))
            script = str(Path(bare_loop.__file__))
            with running([sys.executable, script, str(described)], folder / "bare.log", address) as bare:
                _wait_until_warm(bare, lines, arguments.steps)
                if arguments.spare_core:
                    _share_a_core([*_ranks(storage), *_tree(bare)])
                names = {ours.process.pid: "driver", **dict.fromkeys(_tree(bare), BARE)}
                before = used(_all_started(), names)
                turns = take_turns(
                    (lambda: _others(bare), lambda: _tree(bare)), arguments.rounds, 3 * arguments.rounds, arguments.turn
                )
                spent = between(before, used(_all_started(), names))
        committed = [e for e in read_journal(storage / NAME) if isinstance(e, StepCommitted)]
        plain = bare_loop.read(lines, WORLD_SIZE)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ours_ends, bare_ends = [e.finished_at for e in committed], list(plain.ends.values())
    rounds = [
        {
            "elastictrain_steps_per_s": ours_turn.steps_per_s(ours_ends),
            "bare_steps_per_s": bare_turn.steps_per_s(bare_ends),
            "others": max(ours_turn.others, bare_turn.others),
        }
        for ours_turn, bare_turn in turns
    ]
    counted = sorted(rounds, key=lambda r: r["others"])[: arguments.rounds]
    ratios = [r["elastictrain_steps_per_s"] / r["bare_steps_per_s"] for r in counted]
    compared = [e.loss == plain.losses[e.step] for e in committed if e.step in plain.losses]
    low, _, high = quantiles(ratios, n=4)
    num_ours = sum(turn.num_ended(ours_ends) for turn, _ in turns)
    num_bare = sum(turn.num_ended(bare_ends) for _, turn in turns)
    return {
        "machine": found,
        "spare_core": arguments.spare_core,
        "overrides": arguments.overrides,
        "elastictrain": {"steps_per_s": median(r["elastictrain_steps_per_s"] for r in counted)},
        "bare": {"steps_per_s": median(r["bare_steps_per_s"] for r in counted)},
        "ratio": median(ratios),
        "ratio_quartiles": [low, high],
        "processor_s_per_step": {
            kind: seconds / (num_bare if kind == BARE else num_ours) for kind, seconds in spent.items()
        },
        "losses": {"steps_compared": len(compared), "same_bits": all(compared)},
        "others": max(r["others"] for r in counted),
        "rounds": counted,
        "rounds_left_out": len(rounds) - len(counted),
    }


def _prepare(train: list[str], log: Path) -> None:
    """Make the token shards in a cluster of their own: two idle actors of Ray Data would stay in this one for ever."""
    done = [*train, "train.steps=1", f"run.name={NAME}-data"]
    with log.open("wb") as file:
        subprocess.run(done, stdout=file, stderr=subprocess.STDOUT, check=True)


def _wait_until_warm(bare: Job, lines: Path, steps: int) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while len(bare_loop.read(lines, WORLD_SIZE).ends) < steps:
        bare.require_running()
        if time.monotonic() > end:
            raise RuntimeError(f"the bare loop did not take {steps} steps within {START_TIMEOUT_S:.0f} s")
        time.sleep(1)


def _ranks(storage: Path) -> list[int]:
    return [worker["pid"] for worker in ask("status", NAME, storage)["workers"]]


def _share_a_core(pids: Iterable[int]) -> None:
    core = min(os.sched_getaffinity(0))
    for pid in pids:
        for thread in psutil.Process(pid).threads():
            os.sched_setaffinity(thread.id, {core})


def _all_started() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def _tree(job: Job) -> set[int]:
    process = psutil.Process(job.process.pid)
    return {process.pid, *(child.pid for child in process.children(recursive=True))}


def _others(job: Job) -> set[int]:
    """All of elastictrain and of Ray: bare is bare."""
    return _all_started() - _tree(job)


def told(result: dict[str, Any]) -> str:
    """The result as a table for people."""
    rows = []
    for who, field in (("elastictrain", "elastictrain_steps_per_s"), ("bare loop", "bare_steps_per_s")):
        speeds = sorted(r[field] for r in result["rounds"])
        rows.append([who, f"{median(speeds):.2f}", f"{speeds[0]:.2f}", f"{speeds[-1]:.2f}"])
    low, high = result["ratio_quartiles"]
    num_rounds = len(result["rounds"])
    losses = result["losses"]
    spent = ", ".join(f"{kind} {1000 * s:.1f}" for kind, s in result["processor_s_per_step"].items())
    same = "the same bits" if losses["same_bits"] else "DIFFERENT"
    return "\n".join(
        [
            machine.line(result["machine"]),
            "",
            table(["steps/s", "median", "slowest turn", "fastest turn"], rows),
            "",
            f"ratio: {result['ratio']:.3f}, median of {num_rounds} rounds; quartiles {low:.3f} to {high:.3f}",
            f"other work took up to {result['others']:.0%} of the processors meanwhile; "
            f"rounds left out, disturbed more than that: {result['rounds_left_out']}",
            f"processor time, ms per step: {spent}",
            f"losses: {same} in all {losses['steps_compared']} steps that both took",
        ]
    )


if __name__ == "__main__":
    main()
