"""What fault tolerance costs while nothing fails: elastictrain beside a bare DeepSpeed loop, in turns on one machine.

elastictrain runs as a user runs it: its command line, Ray actors on two local nodes, a warm standby, a snapshot of the
whole state after each step with its replica on the other node, a durable checkpoint every 50 steps, the journal and
MLflow. The bare loop is two processes that train with the same DeepSpeed and do nothing else (bare_loop.py). Both take
the same steps on the same samples, and their losses are compared bit for bit. When both are warm and the standby is
up, they take turns of some seconds (turns.py): a round is one turn of each. The ratio of their steps/s is the median
over the rounds that other work on the machine disturbed least. While the bare loop has its turn nothing else runs, of
elastictrain or of Ray.

Two cases, one after the other. `spare`: all ranks, of both, share one core, and another is there for what is no rank,
as on hosts of GPUs, which have many more cores than ranks. `full`: each core has a rank, and whatever else runs takes
its time from one.

    python benchmarks/overhead.py                                     a table; about 8 minutes
    python benchmarks/overhead.py --cores full --rounds 40 --json     one case, more rounds; one JSON object
    python benchmarks/overhead.py --same-allocator                    the bare loop gets the workers' malloc too
    python benchmarks/overhead.py train.global_batch=64               with other settings than jobs/llm_tiny.yaml's

elastictrain's workers run with the C library's allocator set up for training (runtime/allocator.py), which a bare
script has not. So the plain table says how fast a user trains with the one and with the other, and the one with
`--same-allocator` what all the rest of the platform costs.
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
from turns import Turn, take_turns
from two_nodes import Job, running, two_nodes

from elastictrain.config import TrainConfig
from elastictrain.events import StepCommitted
from elastictrain.runtime.allocator import allocator_environment
from elastictrain.tracking.journal import read_journal

JOB = Path(__file__).resolve().parents[1] / "jobs" / "llm_tiny.yaml"
WORLD_SIZE = 2
NAME = "overhead"
BARE = "bare loop"
CASES = {"spare": "a core left for what is no rank", "full": "a rank on each core"}
NEVER_ENDING = 1_000_000
START_TIMEOUT_S = 120.0


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="rounds that count, in each case (default 12)")
    parser.add_argument("--turn", type=float, default=10.0, metavar="S", help="seconds of a turn (default 10)")
    parser.add_argument("--steps", type=int, default=50, help="steps of warm-up before the turns (default 50)")
    parser.add_argument("--cores", choices=[*CASES, "both"], default="both", help="the cases (default both)")
    parser.add_argument("--same-allocator", action="store_true", help="set up the bare loop's malloc as the workers'")
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
        with two_nodes() as address, running(train, folder / "elastictrain.log", address) as ours:
            wait_until_ready(ours, NAME, storage, arguments.steps)
            job = bare_loop.Setup(
                TrainConfig.load(JOB, settings).to_dict(), str(data_folder(NAME, storage)), WORLD_SIZE, str(lines)
            )
            described = folder / "bare.json"
            described.write_text(json.dumps(asdict(job)))
            script = str(Path(bare_loop.__file__))
            begin = [sys.executable, script, str(described)]
            if arguments.same_allocator:
                begin = ["env", *(f"{name}={value}" for name, value in allocator_environment().items()), *begin]
            with running(begin, folder / "bare.log", address) as bare:
                _wait_until_warm(bare, lines, arguments.steps)
                names = {ours.process.pid: "driver", **dict.fromkeys(_tree(bare), BARE)}
                taken = {}
                for case in CASES if arguments.cores == "both" else [arguments.cores]:
                    _place([*_ranks(storage), *_tree(bare)], one_core=case == "spare")
                    before = used(_all_started(), names)
                    turns = take_turns(
                        (lambda: _others(bare), lambda: _tree(bare)),
                        arguments.rounds,
                        3 * arguments.rounds,
                        arguments.turn,
                    )
                    taken[case] = turns, between(before, used(_all_started(), names))
        committed = [e for e in read_journal(storage / NAME) if isinstance(e, StepCommitted)]
        plain = bare_loop.read(lines, WORLD_SIZE)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    compared = [e.loss == plain.losses[e.step] for e in committed if e.step in plain.losses]
    ends = [e.finished_at for e in committed], list(plain.ends.values())
    return {
        "machine": found,
        "overrides": arguments.overrides,
        "same_allocator": arguments.same_allocator,
        "cases": {case: _compared(*of_case, *ends, arguments.rounds) for case, of_case in taken.items()},
        "losses": {"steps_compared": len(compared), "same_bits": all(compared)},
    }


def _compared(
    turns: list[tuple[Turn, Turn]],
    spent: dict[str, float],
    ours_ends: list[float],
    bare_ends: list[float],
    num_rounds: int,
) -> dict[str, Any]:
    """One case: steps/s of both, turn by turn."""
    rounds = [
        {
            "elastictrain_steps_per_s": ours_turn.steps_per_s(ours_ends),
            "bare_steps_per_s": bare_turn.steps_per_s(bare_ends),
            "others": max(ours_turn.others, bare_turn.others),
        }
        for ours_turn, bare_turn in turns
    ]
    counted = sorted(rounds, key=lambda r: r["others"])[:num_rounds]
    ratios = [r["elastictrain_steps_per_s"] / r["bare_steps_per_s"] for r in counted]
    low, _, high = quantiles(ratios, n=4)
    num_ours = sum(turn.num_ended(ours_ends) for turn, _ in turns)
    num_bare = sum(turn.num_ended(bare_ends) for _, turn in turns)
    return {
        "elastictrain": {"steps_per_s": median(r["elastictrain_steps_per_s"] for r in counted)},
        "bare": {"steps_per_s": median(r["bare_steps_per_s"] for r in counted)},
        "ratio": median(ratios),
        "ratio_quartiles": [low, high],
        "processor_s_per_step": {
            kind: seconds / (num_bare if kind == BARE else num_ours) for kind, seconds in spent.items()
        },
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


def _place(pids: Iterable[int], *, one_core: bool) -> None:
    """Have these processes compute on one core together, or wherever there is room."""
    cores = os.sched_getaffinity(0)
    for pid in pids:
        for thread in psutil.Process(pid).threads():
            os.sched_setaffinity(thread.id, {min(cores)} if one_core else cores)


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
    rows, below = [], []
    for case, found in result["cases"].items():
        low, high = found["ratio_quartiles"]
        speeds = [f"{found[who]['steps_per_s']:.2f}" for who in ("elastictrain", "bare")]
        rows.append([CASES[case], *speeds, f"{found['ratio']:.3f}", f"{low:.3f} to {high:.3f}"])
        spent = ", ".join(f"{kind} {1000 * s:.1f}" for kind, s in found["processor_s_per_step"].items())
        below += [
            f"{CASES[case]}: {len(found['rounds'])} rounds; other work took up to {found['others']:.0%} of the "
            f"processors meanwhile; {found['rounds_left_out']} rounds left out, disturbed more than that",
            f"  processor time, ms per step: {spent}",
        ]
    losses = result["losses"]
    same = "the same bits" if losses["same_bits"] else "DIFFERENT"
    bare = "bare, same malloc" if result["same_allocator"] else "bare loop"
    header = ["steps/s, medians", "elastictrain", bare, "ratio", "quartiles"]
    last = f"losses: {same} in all {losses['steps_compared']} steps that both took"
    return "\n".join([machine.line(result["machine"]), "", table(header, rows), "", *below, last])


if __name__ == "__main__":
    main()
