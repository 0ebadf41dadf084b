"""What a run of a month costs to ask, to report and to submit again: a journal of a million steps, with failures.

The journal is written as a driver writes it, its events those of a run on two workers that loses one every so often.
Then, each in a process of its own as a user's command is: reading it all, folding the report, the HTML of it, and what
a driver reads before it can start anything. Seconds, how many of them a processor worked on it (the same, on a machine
with nothing else to do), and the most memory that the process held.

    python benchmarks/long_run.py                          a million steps; some minutes, 1 GB of disk
    python benchmarks/long_run.py --steps 100000 --json    fewer; one JSON object
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
from figures import table

from elastictrain.config import TrainConfig
from elastictrain.events import (
    Cause,
    CheckpointWritten,
    Event,
    FailureDetected,
    GenerationStarted,
    Member,
    Recovered,
    RunStarted,
    StepCommitted,
    Waits,
)
from elastictrain.tracking.html import render_html
from elastictrain.tracking.journal import Journal, JournalReader
from elastictrain.tracking.report import build_report

STEP_S = 1.0
STEPS_BETWEEN_FAILURES = 5_000
STEPS_BETWEEN_CHECKPOINTS = 1_000
LAYOUT = {"dp": 2, "zero_stage": 1, "micro_batch": 8, "accumulation": 2}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000, help="steps of the run (default 1,000,000)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(part(arguments.part, arguments.folder)))
        return
    result = measure(arguments.steps)
    print(json.dumps(result, indent=2) if arguments.json else told(result))


def measure(num_steps: int) -> dict[str, Any]:
    """Write the journal, and do each part in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="long-run-") as name:
        folder = Path(name)
        begun = time.perf_counter()
        journal = Journal(folder, 1)
        num_events = 0
        for event in events(num_steps):
            journal.append(event)
            num_events += 1
        journal.close()
        written_s = time.perf_counter() - begun
        found = {}
        for what in PARTS:
            command = [sys.executable, __file__, "--part", what, "--folder", name]
            found[what] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return {
            "machine": machine.describe(),
            "steps": num_steps,
            "events": num_events,
            "bytes": journal.path.stat().st_size,
            "append_us": written_s / num_events * 1e6,
            "parts": found,
        }


PARTS = {
    "read": "read the journal",
    "report": "read it and fold the report",
    "html": "the same, and draw the HTML",
}


def part(what: str, folder: Path) -> dict[str, float]:
    """In this process."""
    base, begun, worked = _most_bytes(), time.perf_counter(), time.process_time()
    reader = JournalReader(folder)
    found = reader.events()
    if what != "read":
        report = build_report(found)
        if what == "html":
            render_html(report)
    return {
        "seconds": time.perf_counter() - begun,
        "processor_s": time.process_time() - worked,
        "bytes": _most_bytes() - base,
    }


def events(num_steps: int) -> Iterator[Event]:
    """Of a run with so many steps."""
    at, generation, chain = 1_790_000_000.0, 0, ""
    yield RunStarted(at, "long", 1, TrainConfig.load(None, ["run.name=long"]).to_dict(), {"python": "3.11"})
    yield _generation(at, generation, 1, "start", "fresh")
    for step in range(1, num_steps + 1):
        if step % STEPS_BETWEEN_FAILURES == 0:
            cause = Cause("signal", "SIGKILL")
            yield FailureDetected(at + 0.2, at + 0.25, generation, "worker_lost", (1,), "b", 2, cause, step)
            generation, at = generation + 1, at + 0.6
            yield _generation(at, generation, step, "worker_lost", "memory")
        chain = hashlib.sha256(f"{chain}{step}".encode()).hexdigest()
        yield StepCommitted(
            at=at + STEP_S, generation=generation, step=step, loss=2.0 + 5 * math.exp(-step / 1e5),
            sample_chain=chain, num_samples=32, num_tokens=4096, begun_at=at, finished_at=at + STEP_S - 0.01,
            learning_rate=3e-4, grad_norm=1.0 + math.sin(step), data_wait_s=0.001, snapshot_stall_s=0.002,
            waits=Waits(0.001, 0.05, 0.002),
        )  # fmt: skip
        at += STEP_S
        if generation and step % STEPS_BETWEEN_FAILURES == 0:
            yield Recovered(at, generation, step, 0, "memory", "bit_exact")
        if step % STEPS_BETWEEN_CHECKPOINTS == 0:
            uri, num_bytes = f"runs/long/checkpoints/{step}", 12_000_000
            yield CheckpointWritten(at, step, uri, num_bytes, "0" * 64, 0.1, 32 * step, chain, 2.0, LAYOUT)


def _generation(at: float, index: int, first_step: int, cause: str, source: Any) -> GenerationStarted:
    members = tuple(Member(rank, f"w{rank}", rank + 1, "ab"[rank]) for rank in range(2))
    phases_s = {"fence": 0.01, "place": 0.01, "engine": 0.05, "restore": 0.04}
    return GenerationStarted(at, index, LAYOUT, 2, first_step, cause, source, "bit_exact", members, phases_s)


def _most_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def told(result: dict[str, Any]) -> str:
    """For people."""
    rows = [
        [
            PARTS[what],
            *(f"{found[which]:.1f} s" for which in ("seconds", "processor_s")),
            f"{found['bytes'] / 1e9:.2f} GB",
        ]
        for what, found in result["parts"].items()
    ]
    head = (
        f"{result['steps']:,} steps, {result['events']:,} events, {result['bytes'] / 1e9:.2f} GB; "
        f"{result['append_us']:.0f} us to append one"
    )
    return "\n".join(
        [machine.line(result["machine"]), "", head, "", table(["", "time", "of a processor", "memory"], rows)]
    )


if __name__ == "__main__":
    main()
