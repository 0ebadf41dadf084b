"""Hundreds of faults in one run, and the losses of a run that nobody disturbed.

A tiny language model trains on three local Ray nodes with two ranks and a warm standby, while ranks get SIGKILL,
SIGSEGV and SIGSTOP, alone and together, raise exceptions, and standbys, keepers and whole nodes are killed, at random
moments. Then the same steps are trained undisturbed, and every loss is compared, bit for bit. On the way processes,
file descriptors, threads and memory are counted: what grows with the faults would end a month's run.

    python benchmarks/soak.py                                  200 faults, about 20 minutes, and the undisturbed run
    python benchmarks/soak.py --faults 15 --seed 3             a short one
    python benchmarks/soak.py --out soak.json --svg soak.svg   results to keep, and a picture of both curves

Exit status 1 when a loss differs, a sample came twice or never, a fault was not survived, or something grew.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import machine
import psutil
from elastictrain_run import COMMAND, ask
from figures import table
from two_nodes import Job, Nodes, local_nodes, running

from elastictrain.cli.runs import find_run
from elastictrain.errors import ConfigError
from elastictrain.events import FailureDetected, Recovered
from elastictrain.status import Status

CONFIG: dict[str, dict[str, Any]] = {
    "train": {
        "steps": 10_000_000,
        "compile": False,
        "global_batch": 8,
        "micro_batch": 2,
        "learning_rate": 2e-3,
        "min_learning_rate": 2e-3,  # constant: the undisturbed run is as long as this one came to be
        "warmup_steps": 20,
        "sample_tokens": 0,
    },
    "model": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "dropout": 0.1},
    "data": {
        "corpus": str(Path(sysconfig.get_paths()["stdlib"]) / "email"),
        "seq_len": 64,
        "vocab_size": 512,
        "num_shards": 2,
        "validation_fraction": 0.1,
        "validation_samples": 8,
    },
    "elastic": {"min_workers": 2, "max_workers": 2, "standby": 1, "hang_patience_s": 2.0, "max_failures": 10},
    "snapshot": {"every": 1},  # steps of 30 ms: by itself it would take one in a few steps, and lose as many
    "checkpoint": {"every": 500},
}
KINDS = {"kill": 8, "segfault": 4, "stop": 2, "both": 2, "standby": 2, "keeper": 2, "node": 1}
"""What is done from outside, by weight; exceptions come by plan."""
EXCEPTION_EVERY = 60
"""Steps between planned exceptions."""
PATIENCE_S = 120.0
WARM_FAULTS = 20
"""Faults after which nothing may grow any more."""


@dataclass
class Count:
    """What the run holds, at one moment."""

    faults: int
    processes: int
    driver_mib: float
    driver_fds: int
    driver_threads: int
    rank_fds: int
    """Of the rank that has survived the most."""
    rank_threads: int
    survived: int
    """Generations that it has survived."""


@dataclass
class Soak:
    """The run under way."""

    job: Job
    storage: Path
    nodes: Nodes
    chance: random.Random
    struck: Counter[str] = field(default_factory=Counter)
    counts: list[Count] = field(default_factory=list)
    first_seen: dict[int, int] = field(default_factory=dict)
    """Generation in which each rank's process was first seen."""

    def status(self) -> Status:
        """What `elastictrain status` reads."""
        with suppress(ConfigError):  # it has not begun
            if (found := find_run(str(self.storage), "soak").status()) is not None:
                return found
        return Status.beginning("soak", time.time())

    def until_well(self, generation: int, standby: bool) -> Status:
        """Wait until this generation or a later one trains, and a standby is there."""
        end = time.monotonic() + PATIENCE_S
        while True:
            self.job.require_running()
            now = self.status()
            well = now.status == "running" and len(now.workers) == CONFIG["elastic"]["min_workers"]
            if well and now.generation >= generation and (now.standbys or not standby):
                return now
            if time.monotonic() > end:
                raise RuntimeError(f"not well again within {PATIENCE_S:.0f} s: {now}")
            time.sleep(0.05)

    def strike(self) -> None:
        """One fault, and wait until it is survived."""
        kind = self.chance.choices([*KINDS], [*KINDS.values()])[0]
        before = self.until_well(0, standby=self.chance.random() < 0.8)
        time.sleep(self.chance.random() * 0.5)
        pids = [worker.pid for worker in before.workers]
        victim = self.chance.choice(pids)
        harm = {"kill": signal.SIGKILL, "segfault": signal.SIGSEGV, "stop": signal.SIGSTOP}
        match kind:
            case "kill" | "segfault" | "stop":
                _signal(harm[kind], victim)
            case "both":
                _signal(signal.SIGKILL, *pids)
            case "standby":
                _signal(signal.SIGKILL, *(standby.pid for standby in before.standbys))
            case "keeper":
                _signal(signal.SIGKILL, self.chance.choice(_named("ray::Keeper")))
            case "node":
                self._kill_a_node()
        self.struck[kind] += 1
        self.until_well(before.generation + (kind not in ("standby", "keeper", "node")), standby=False)

    def _kill_a_node(self) -> None:
        nodes = sorted(self.nodes.cluster.worker_nodes, key=lambda node: str(node.node_ip_address))
        process = self.chance.choice(nodes).all_processes["raylet"][0].process
        children = psutil.Process(process.pid).children(recursive=True)
        _signal(signal.SIGKILL, process.pid, *(child.pid for child in children))
        process.wait()
        self.nodes.replace_dead()

    def count(self) -> None:
        """Note what the run holds now."""
        now = self.status()
        driver = psutil.Process(self.job.process.pid)
        ranks = {}
        for worker in now.workers:
            since = self.first_seen.setdefault(worker.pid, now.generation)
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(worker.pid)
                ranks[now.generation - since] = process.num_fds(), process.num_threads()
        oldest = max(ranks, default=0)
        fds, threads = ranks.get(oldest, (0, 0))
        self.counts.append(
            Count(
                faults=now.generation,
                processes=len(psutil.Process().children(recursive=True)),
                driver_mib=driver.memory_info().rss / 2**20,
                driver_fds=driver.num_fds(),
                driver_threads=driver.num_threads(),
                rank_fds=fds,
                rank_threads=threads,
                survived=oldest,
            )
        )


def _signal(number: signal.Signals, *pids: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _named(start: str) -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.name().startswith(start):
                found.append(process.pid)
    return found


def main() -> None:
    """Parse, soak, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="faults to survive (default 200)")
    parser.add_argument("--seed", type=int, default=None, help="of the faults and their moments; random without")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write both loss curves as a picture")
    arguments = parser.parse_args()
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    result, curves = soak(arguments.faults, seed)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.svg:
        arguments.svg.write_text(picture(*curves, result["generations"]))
    print(told(result))
    sys.exit(1 if result["problems"] else 0)


def soak(num_faults: int, seed: int) -> tuple[dict[str, Any], tuple[Any, Any]]:
    """The disturbed run and the undisturbed one: the result, and both lists of losses."""
    found = machine.describe()
    chance = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    storage, config = folder / "runs", folder / "soak.json"
    config.write_text(json.dumps(CONFIG))
    plan = [
        {"at": step, "rank": chance.randrange(2), "kind": "exception", "phase": chance.choice(["forward", "update"])}
        for step in range(EXCEPTION_EVERY, EXCEPTION_EVERY * (num_faults // 2 + 1), EXCEPTION_EVERY)
    ]
    train = [str(COMMAND), "train", str(config), f"run.storage={storage}"]
    begun = time.monotonic()
    try:
        with local_nodes(3) as nodes:
            address = nodes.address
            disturbed = [*train, "run.name=soak", f"faults={json.dumps(plan)}"]
            with running(disturbed, folder / "soak.log", address) as job:
                state = Soak(job, storage, nodes, chance)
                state.until_well(0, standby=True)
                while (so_far := _num_faults(state, len(plan))) < num_faults:
                    print(f"{so_far} faults", file=sys.stderr, flush=True)
                    state.strike()
                    state.count()
                state.until_well(0, standby=False)
                soaked_s = time.monotonic() - begun
            report = ask("report", "soak", storage)
            calm = [*train, "run.name=calm", f"train.steps={report['steps']}", "elastic.standby=0"]
            with running(calm, folder / "calm.log", address) as job:
                job.process.wait()
            undisturbed = ask("report", "calm", storage)
        events = find_run(str(storage), "soak").events()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    failures = [e for e in events if isinstance(e, FailureDetected)]
    recoveries = [f["recovered_s"] for f in report["failures"] if f["recovered_s"] is not None]
    first_difference = next((a[0] for a, b in zip(report["loss"], undisturbed["loss"], strict=True) if a != b), None)
    result = {
        "machine": found,
        "seed": seed,
        "seconds": soaked_s,
        "struck": {**state.struck, "exception": len(report["faults_injected"])},
        "faults": sum(state.struck.values()) + len(report["faults_injected"]),
        "failures": dict(Counter(f"{e.kind}: {e.cause.message.split(':')[0][:40]}" for e in failures)),
        "recoveries": sum(isinstance(e, Recovered) for e in events),
        "recovered_s": sorted(recoveries),
        "sources": dict(Counter(g["source"] for g in report["generations"])),
        "continuations": dict(Counter(g["continuation"] for g in report["generations"])),
        "generations": [[g["first_step"], g["cause"]] for g in report["generations"]],
        "steps": report["steps"],
        "lost_steps": report["lost_steps"],
        "goodput": report["goodput"],
        "first_different_loss": first_difference,
        "same_samples": report["sample_digest"] == undisturbed["sample_digest"],
        "counts": [asdict(count) for count in state.counts],
    }
    return {**result, "problems": problems(result)}, (report["loss"], undisturbed["loss"])


def _num_faults(state: Soak, planned: int) -> int:
    return sum(state.struck.values()) + min(state.status().step // EXCEPTION_EVERY, planned)


def problems(result: dict[str, Any]) -> list[str]:
    """What must not be; empty when all is well."""
    found = []
    if result["first_different_loss"] is not None:
        found.append(f"the loss of step {result['first_different_loss']} is not that of the undisturbed run")
    if not result["same_samples"]:
        found.append("the samples are not those of the undisturbed run")
    counts = [count for count in result["counts"] if count["faults"] >= WARM_FAULTS]
    if len(counts) >= 10:
        first, last = counts[:5], counts[-5:]
        for what, allowed in (("processes", 3), ("driver_fds", 8), ("driver_threads", 4), ("driver_mib", 40)):
            growth = min(c[what] for c in last) - max(c[what] for c in first)
            if growth > allowed:
                found.append(f"{what} grew by {growth:.0f} from fault {first[0]['faults']} to {last[-1]['faults']}")
    survivors = [count for count in result["counts"] if count["survived"] >= 3]
    if survivors:
        youngest, oldest = (pick(survivors, key=lambda c: c["survived"]) for pick in (min, max))
        for what, allowed in (("rank_fds", 4), ("rank_threads", 4)):
            if oldest[what] - youngest[what] > allowed:
                found.append(
                    f"{what} grew from {youngest[what]} to {oldest[what]} in a rank that survived "
                    f"{oldest['survived']} generations"
                )
    return found


def told(result: dict[str, Any]) -> str:
    """The result for people."""
    times = result["recovered_s"]
    middle, late = times[len(times) // 2], times[int(0.95 * (len(times) - 1))]
    counts = result["counts"]
    rows = [
        [name, *(f"{c[key]:.0f}" for c in (counts[0], counts[len(counts) // 2], counts[-1]))]
        for name, key in (
            ("processes", "processes"),
            ("driver, MiB", "driver_mib"),
            ("driver, files", "driver_fds"),
            ("driver, threads", "driver_threads"),
            ("oldest rank, files", "rank_fds"),
            ("oldest rank, threads", "rank_threads"),
        )
    ]
    struck = ", ".join(f"{kind} {count}" for kind, count in sorted(result["struck"].items()))
    same = "all the bits of the undisturbed run" if result["first_different_loss"] is None else "DIFFERENT"
    return "\n".join(
        [
            machine.line(result["machine"]),
            "",
            f"{result['faults']} faults in {result['seconds'] / 60:.1f} minutes (seed {result['seed']}): {struck}",
            f"recovered: median {middle:.2f} s, 95 % within {late:.2f} s; from {result['sources']}",
            f"{result['steps']} steps, {result['lost_steps']} done again; losses: {same}",
            "",
            table(["", "first", "middle", "last"], rows),
            "",
            *(f"PROBLEM: {problem}" for problem in result["problems"]),
            "" if result["problems"] else "no problem found",
        ]
    )


def picture(disturbed: list[Any], undisturbed: list[Any], generations: list[Any]) -> str:
    """Both loss curves, the undisturbed one wide and pale under the other; a tick for each new generation."""
    width, height, edge = 960, 360, 30
    top, low = max(v for _, v in undisturbed), min(v for _, v in undisturbed)
    steps = undisturbed[-1][0]

    def path(losses: list[Any]) -> str:
        every = max(1, len(losses) // 2000)
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in losses[::every])

    def x(step: int) -> float:
        return float(edge + (width - 2 * edge) * step / steps)

    def y(value: float) -> float:
        return float(edge + (height - 2 * edge) * (top - value) / (top - low))

    ticks = "".join(f'<path d="M{x(step):.1f} {height - edge}v8" stroke="#e03131"/>' for step, _ in generations[1:])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="#fff"/>'
        f'<polyline points="{path(undisturbed)}" fill="none" stroke="#ffc078" stroke-width="6"/>'
        f'<polyline points="{path(disturbed)}" fill="none" stroke="#3b5bdb" stroke-width="1"/>{ticks}'
        f'<text x="{edge}" y="20">loss over {steps} steps: {len(generations) - 1} new generations (red) in blue, '
        f"undisturbed in orange under it</text></svg>\n"
    )


if __name__ == "__main__":
    main()
