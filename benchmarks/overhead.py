"""What fault tolerance costs while nothing fails: elastictrain beside bare loops, in turns on one machine.

elastictrain runs as a user runs it: its command line, Ray actors on two local nodes, a warm standby, a snapshot of the
whole state after each step with its replica on the other node, a durable checkpoint every 50 steps, the journal and
MLflow. The bare loop is two processes that train with the same DeepSpeed and do nothing else (bare_loop.py). Both take
the same steps on the same samples, and their losses are compared bit for bit. When both are warm and the standby is
up, they take turns of some seconds (turns.py): a round is one turn of each. The ratio of their steps/s is the median
over the rounds that other work on the machine disturbed least. While a bare loop has its turn nothing else runs, of
elastictrain or of Ray. `--beside` names more loops: torch's DDP and FSDP2, and the Trainer of transformers (which needs
accelerate, see plain_trainer.py), all with the same model, dtype, batch and samples. There elastictrain compiles the
model's blocks, as it does by default in long runs, and the scripts don't; with `train.compile=true` or `false` both do,
or neither. Beside DeepSpeed alone neither does.

Two cases, one after the other. `spare`: all ranks, of both, share one core, and another is there for what is no rank,
as on hosts of GPUs, which have many more cores than ranks. `full`: each core has a rank, and whatever else runs takes
its time from one.

    python benchmarks/overhead.py                                     a table; about 8 minutes
    python benchmarks/overhead.py --cores full --rounds 40 --json     one case, more rounds; one JSON object
    python benchmarks/overhead.py --same-allocator                    the bare loop gets the workers' malloc too
    python benchmarks/overhead.py --beside deepspeed,ddp,fsdp2,trainer
    python benchmarks/overhead.py train.global_batch=64               with other settings than jobs/llm_tiny.yaml's
    python benchmarks/overhead.py --cores full --job benchmarks/waiting.yaml     steps that leave the processors free

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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from turns import Round, take_turns
from two_nodes import Job, running, two_nodes

from elastictrain.config import TrainConfig
from elastictrain.events import StepCommitted
from elastictrain.runtime.home import settled
from elastictrain.tracking.journal import read_journal

JOB = Path(__file__).resolve().parents[1] / "jobs" / "llm_tiny.yaml"
WORLD_SIZE = 2
NAME = "overhead"
LOOPS = {
    "deepspeed": "bare loop",
    "ddp": "torch DDP",
    "fsdp2": "torch FSDP2",
    "trainer": "Hugging Face Trainer",
}
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
    parser.add_argument("--beside", default="deepspeed", metavar="LOOPS", help=f"of {', '.join(LOOPS)}; with commas")
    parser.add_argument("--same-allocator", action="store_true", help="set up the loops' malloc as the workers'")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON object there too")
    parser.add_argument("--job", type=Path, default=JOB, metavar="FILE", help="what all train (jobs/llm_tiny.yaml)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change in both")
    arguments = parser.parse_args()
    arguments.beside = arguments.beside.split(",")
    if unknown := set(arguments.beside) - LOOPS.keys():
        parser.error(f"--beside {', '.join(unknown)}: there are {', '.join(LOOPS)}")
    result = measure(arguments)
    text = json.dumps(result, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text if arguments.json else told(result))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start all, let them take turns, compare."""
    found = machine.describe()
    engine_alone = ["train.compile=false"] if arguments.beside == ["deepspeed"] else []
    settings = [*engine_alone, *arguments.overrides, "faults=[]", f"train.steps={NEVER_ENDING}"]
    folder = Path(tempfile.mkdtemp(prefix="overhead-"))
    storage, loops = folder / "runs", arguments.beside
    train = [str(COMMAND), "train", str(arguments.job), *settings, f"run.name={NAME}", f"run.storage={storage}"]
    try:
        _prepare(train, folder / "prepare.log")
        with ExitStack() as jobs:
            address = jobs.enter_context(two_nodes())
            ours = jobs.enter_context(running(train, folder / "elastictrain.log", address))
            wait_until_ready(ours, NAME, storage, arguments.steps)
            bare = {loop: jobs.enter_context(_loop(loop, settings, storage, address, arguments)) for loop in loops}
            for loop, job in bare.items():
                _wait_until_warm(job, storage.parent / loop, arguments.steps)
            names = {pid: LOOPS[loop] for loop, job in bare.items() for pid in _tree(job)}
            names[ours.process.pid] = "driver"
            taken = {}
            for case in CASES if arguments.cores == "both" else [arguments.cores]:
                _place([*_ranks(storage), *(pid for job in bare.values() for pid in _tree(job))], case == "spare")
                before = used(_all_started(), names)
                turns = take_turns(
                    [lambda: _others(bare.values()), *(lambda job=job: _tree(job) for job in bare.values())],
                    arguments.rounds,
                    3 * arguments.rounds,
                    arguments.turn,
                )
                taken[case] = turns, between(before, used(_all_started(), names))
        committed = [e for e in read_journal(storage / NAME) if isinstance(e, StepCommitted)]
        trained = {loop: bare_loop.read(folder / loop, WORLD_SIZE) for loop in loops}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ends = [[e.finished_at for e in committed], *([*trained[loop].ends.values()] for loop in loops)]
    result = {
        "machine": found,
        "job": arguments.job.name,
        "overrides": arguments.overrides,
        "same_allocator": arguments.same_allocator,
        "cases": {case: _compared(loops, *of_case, ends, arguments.rounds) for case, of_case in taken.items()},
    }
    if "deepspeed" in loops and TrainConfig.load(arguments.job, settings).train.compile is not None:
        losses = trained["deepspeed"].losses
        compared = [e.loss == losses[e.step] for e in committed if e.step in losses]
        result["losses"] = {"steps_compared": len(compared), "same_bits": all(compared)}
    return result


def _compared(
    loops: Sequence[str], rounds: list[Round], spent: dict[str, float], ends: list[list[float]], num_rounds: int
) -> dict[str, Any]:
    """One case: steps/s of elastictrain and of each loop, turn by turn; `ends` of their steps in this order."""
    counted = sorted(rounds, key=lambda turns: max(turn.others for turn in turns))[:num_rounds]
    speeds = [[turn.steps_per_s(of_job) for turn, of_job in zip(turns, ends, strict=True)] for turns in counted]
    num_steps = [sum(turns[job].num_ended(of_job) for turns in rounds) for job, of_job in enumerate(ends)]
    of_loop = {LOOPS[loop]: steps for loop, steps in zip(loops, num_steps[1:], strict=True)}
    beside = {loop: _beside(speeds, number) for number, loop in enumerate(loops, 1)}
    return {
        "elastictrain": {"steps_per_s": median(ours for ours, *_ in speeds)},
        "beside": beside,
        "ratio": beside[loops[0]]["ratio"],
        "processor_s_per_step": {kind: s / of_loop.get(kind, num_steps[0]) for kind, s in spent.items()},
        "others": max(turn.others for turns in counted for turn in turns),
        "rounds": speeds,
        "rounds_left_out": len(rounds) - len(counted),
    }


def _beside(speeds: list[list[float]], number: int) -> dict[str, Any]:
    ratios = [of_round[0] / of_round[number] for of_round in speeds]
    low, _, high = quantiles(ratios, n=4)
    steps_per_s = median(of_round[number] for of_round in speeds)
    return {"steps_per_s": steps_per_s, "ratio": median(ratios), "ratio_quartiles": [low, high]}


@contextmanager
def _loop(loop: str, settings: list[str], storage: Path, address: str, arguments: argparse.Namespace) -> Iterator[Job]:
    """One of the loops, under way."""
    lines = storage.parent / loop
    lines.mkdir()
    config = settled(TrainConfig.load(arguments.job, settings)).to_dict()
    folder, same = str(data_folder(NAME, storage)), arguments.same_allocator
    setup = bare_loop.Setup(config, folder, WORLD_SIZE, str(lines), loop, same)
    described = lines / "setup.json"
    described.write_text(json.dumps(asdict(setup)))
    begin = [sys.executable, str(Path(bare_loop.__file__)), str(described)]
    with running(begin, lines / "log", address) as job:
        yield job


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
            raise RuntimeError(f"{lines.name} did not take {steps} steps within {START_TIMEOUT_S:.0f} s")
        time.sleep(1)


def _ranks(storage: Path) -> list[int]:
    return [worker["pid"] for worker in ask("status", NAME, storage)["workers"]]


def _place(pids: Iterable[int], one_core: bool) -> None:
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


def _others(jobs: Iterable[Job]) -> set[int]:
    """All of elastictrain and of Ray: bare is bare."""
    return _all_started() - {pid for job in jobs for pid in _tree(job)}


def told(result: dict[str, Any]) -> str:
    """The result as a table for people."""
    rows, below = [], []
    for case, found in result["cases"].items():
        ours = f"{found['elastictrain']['steps_per_s']:.2f}"
        for loop, beside in found["beside"].items():
            low, high = beside["ratio_quartiles"]
            speeds = [ours, f"{beside['steps_per_s']:.2f}", f"{beside['ratio']:.3f}", f"{low:.3f} to {high:.3f}"]
            rows.append([CASES[case], LOOPS[loop], *speeds])
        spent = ", ".join(f"{kind} {1000 * s:.1f}" for kind, s in found["processor_s_per_step"].items())
        below += [
            f"{CASES[case]}: {len(found['rounds'])} rounds; other work took up to {found['others']:.0%} of the "
            f"processors meanwhile; {found['rounds_left_out']} rounds left out, disturbed more than that",
            f"  processor time, ms per step: {spent}",
        ]
    if "losses" in result:
        losses = result["losses"]
        same = "the same bits" if losses["same_bits"] else "DIFFERENT"
        below.append(f"losses: {same} in all {losses['steps_compared']} steps that elastictrain and the bare loop took")
    beside = "beside, same malloc" if result["same_allocator"] else "beside"
    header = ["steps/s, medians", beside, "elastictrain", "beside it", "ratio", "quartiles"]
    head = [machine.line(result["machine"]), " ".join(["all train", result["job"], *result["overrides"]])]
    return "\n".join([*head, "", table(header, rows), "", *below])


if __name__ == "__main__":
    main()
