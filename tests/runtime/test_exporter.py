"""What is exported of a run's files; that Prometheus gets it is tested on a cluster."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from elastictrain.events import NodesMeasured, RunStarted
from elastictrain.runtime.exporter import Exporter
from elastictrain.status import Status, WorkerStatus
from elastictrain.tracking.journal import Journal
from elastictrain.tracking.metrics import METRICS

Told = dict[tuple[str, str], float]


class Run:
    """A run's folder, and what was exported of it last, by metric and rank or bucket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told: Told = {}
        self.journal = Journal(folder, 1)
        self.exporter = Exporter(folder, "mine", self._set)

    def _set(self, name: str, value: float, labels: dict[str, str]) -> None:
        (metric,) = (m for m in METRICS if m.name == name)
        assert labels["run"] == "mine"
        assert labels.keys() == {"run", *metric.labels}
        self.told[name, labels.get("rank") or labels.get("bucket") or ""] = value

    def write(self, num_workers: int, **changes: object) -> None:
        """Replace status.json."""
        workers = tuple(WorkerStatus(rank, f"w{rank}", 1, "n", "forward", 7) for rank in range(num_workers))
        status = replace(Status.beginning("mine", 0.0), status="running", world_size=num_workers, workers=workers)
        (self.folder / "status.json").write_text(json.dumps(replace(status, **changes).to_json()))

    def export(self) -> Told:
        """Export now; what was set."""
        self.told = {}
        self.exporter.export()
        return self.told


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_memory_is_told_of_the_ranks_that_there_are(run: Run) -> None:
    run.journal.append(NodesMeasured(0.0, 7, (), (300, 400)))
    run.write(2)
    assert run.export()["elastictrain_rank_memory_bytes", "1"] == 400
    run.write(1)  # and nobody has measured since
    assert math.isnan(run.export()["elastictrain_rank_memory_bytes", "1"])


def test_a_rank_that_is_gone_becomes_no_number_once(run: Run) -> None:
    run.write(2)
    assert run.export()["elastictrain_rank_step", "1"] == 7
    run.write(1)
    told = run.export()
    assert told["elastictrain_rank_step", "0"] == 7
    assert math.isnan(told["elastictrain_rank_step", "1"])
    assert ("elastictrain_rank_step", "1") not in run.export()


def test_nothing_is_told_before_there_is_a_state_or_of_one_that_is_damaged(run: Run) -> None:
    assert run.export() == {}
    (run.folder / "status.json").write_text('{"run": "mi')
    assert run.export() == {}


def test_a_loss_comes_when_there_is_one(run: Run) -> None:
    run.write(1)
    assert ("elastictrain_loss", "") not in run.export()
    run.write(1, loss=2.5)
    assert run.export()["elastictrain_loss", ""] == 2.5


def test_the_ledger_goes_on_while_the_run_does_and_stands_still_afterwards(run: Run) -> None:
    run.write(1)
    run.journal.append(RunStarted(1000.0, "mine", 1, {}, {}))
    assert run.export()["elastictrain_wall_seconds", "startup"] > 1e6  # since 1970
    run.write(0, status="complete")
    assert run.export()["elastictrain_wall_seconds", "startup"] == 0
