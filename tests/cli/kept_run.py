"""One real run in a storage: journal, status, lock and checkpoints, as a driver leaves them."""

import fcntl
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from typer.testing import CliRunner, Result

from elastictrain.checkpoint.store import CheckpointStore
from elastictrain.cli import app
from elastictrain.config import TrainConfig
from elastictrain.events import (
    Cause,
    CheckpointWritten,
    DataReady,
    Evaluated,
    Event,
    FailureDetected,
    FaultInjected,
    GenerationStarted,
    Member,
    Recovered,
    RunEnded,
    RunStarted,
    StepCommitted,
)
from elastictrain.state.manifest import Manifest
from elastictrain.state.tensors import Fragment, LogicalTensor, ShardIndex
from elastictrain.status import NodeStatus, StandbyStatus, Status, WorkerStatus
from elastictrain.storage import Storage
from elastictrain.tracking.journal import Journal

LAYOUT = {"dp": 2, "zero_stage": 1, "micro_batch": 4, "accumulation": 2}
BEGIN = 1_700_000_000.0


class KeptRun:
    """A run in a storage, told step by step."""

    def __init__(self, storage: Path, name: str = "quickstart") -> None:
        self.name = name
        self.storage = storage
        self.folder = storage / name
        self.folder.mkdir(parents=True)
        self.store = CheckpointStore(Storage.open(str(storage)).run(name))
        self.journal = Journal(self.folder, 1)
        self.config = TrainConfig.load(None, [f"run.name={name}", "train.steps=4"])
        self.write_status(Status(
            run=name, status="running", attempt=1, step=3, steps=4, world_size=2, layout="dp2 zero1 4x2", generation=1,
            loss=5.25, tokens_per_s=4096.0, goodput=0.875, lost_steps=1, last_recovery_s=0.31, message="",
            workers=tuple(WorkerStatus(r, f"worker-{r}", 4710 + r, f"n{r}", "training", 3) for r in range(2)),
            standbys=(StandbyStatus("worker-3", 4713, "n0"),),
            nodes=(NodeStatus("n0", "127.0.0.2", True), NodeStatus("n1", "127.0.0.3", True)),
            driver_pid=4700, updated_at=BEGIN + 4,
        ))  # fmt: skip

    def write_status(self, status: Status) -> None:
        self.status = status
        (self.folder / "status.json").write_text(json.dumps(status.to_json()))

    def change_status(self, **changes: object) -> None:
        self.write_status(replace(self.status, **changes))

    def tell(self, *events: Event) -> None:
        for event in events:
            self.journal.append(event)

    def generation(self, at: float, index: int, first_step: int, cause: str) -> None:
        members = tuple(Member(r, f"worker-{r}", 4710 + r, f"n{r}") for r in range(2))
        source = "memory" if index else "fresh"
        self.tell(GenerationStarted(BEGIN + at, index, LAYOUT, 2, first_step, cause, source, "bit_exact", members))

    def step(self, at: float, step: int, loss: float, generation: int = 0) -> None:
        begun, done = BEGIN + at, BEGIN + at + 0.4
        self.tell(
            StepCommitted(
                done + 0.01, generation, step, loss, f"{step:064x}", 16, 2048, begun, done, 1e-3, 1.0, 0.01, 0.001
            )
        )

    def checkpoint(self, at: float, step: int) -> None:
        size = LogicalTensor("param/weight", (8,))
        index = ShardIndex((Fragment("param/weight", 0, 8),))
        shard = self.store.write_shard(step, 0, 1, index, struct.pack("<8f", *range(step, step + 8)))
        stored = self.store.commit(
            Manifest(self.name, step, 16 * step, f"{step:064x}", 5.0, LAYOUT, {}, (size,), (shard,), BEGIN + at)
        )
        self.tell(
            CheckpointWritten(
                BEGIN + at, step, stored.uri, stored.num_bytes, stored.sha256, 0.1, 16 * step, "", 5.0, LAYOUT
            )
        )

    def killed_and_recovered(self) -> None:
        """Three steps, of which the third was begun twice, and a checkpoint after each."""
        self.tell(
            RunStarted(BEGIN, self.name, 1, self.config.to_dict(), {"python": "3.11"}),
            DataReady(BEGIN + 1, "runs/data", "0" * 64, 1000, 20, 0.5, False),
        )
        self.generation(2, 0, 1, "start")
        self.step(2.1, 1, 7.0)
        self.step(2.6, 2, 6.5)
        self.checkpoint(3.05, 2)
        self.tell(
            FaultInjected(BEGIN + 3.2, 0, 3, 1, "kill"),
            FailureDetected(
                BEGIN + 3.2, BEGIN + 3.21, 0, "worker_lost", (1,), "n1", 4711, Cause("signal", "SIGKILL"), 3
            ),
        )
        self.generation(3.4, 1, 3, "worker_lost")
        self.step(3.41, 3, 5.25, generation=1)
        self.tell(Recovered(BEGIN + 3.51, 1, 3, 1, "memory", "bit_exact"))
        self.checkpoint(3.9, 3)

    def completed(self, sample: str = "def main():\n    return 1", gzip_bits_per_byte: float = 2.0) -> None:
        self.step(4, 4, 5.0, generation=1)
        self.checkpoint(4.5, 4)
        self.tell(
            Evaluated(BEGIN + 5, 4, 5.1, 2.5, gzip_bits_per_byte, 1000, sample),
            RunEnded(BEGIN + 5.5, "complete", 4),
        )
        self.change_status(status="complete", step=4)

    @contextmanager
    def driven(self, pid: str = "") -> Iterator[None]:
        """Hold the run's lock, as its driver does, or another one of this pid."""
        with (self.folder / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.write(pid.encode())
            lock.flush()
            yield


def run(*arguments: str | Path, status: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == status, result.output
    return result


def told(kept: KeptRun, command: str, *arguments: str | Path, status: int = 0) -> Result:
    return run(command, *arguments, "--storage", kept.storage, status=status)
