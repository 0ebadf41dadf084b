"""What a sweep is resumed from, and what it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from elastictrain.cli.tune import summary
from elastictrain.config import TrainConfig
from elastictrain.errors import ConfigError, DataError, RunConflictError
from elastictrain.sweep.record import SweepRecord, Trial
from elastictrain.sweep.space import Domain, Sweep
from elastictrain.tracking.sweep_chart import sweep_chart

SWEEP = Sweep(name="lr", trials=3, space={"train.learning_rate": Domain(loguniform=(1e-4, 1e-2))})


def config(folder: Path, **train: Any) -> TrainConfig:
    return TrainConfig.from_dict({"run": {"storage": str(folder)}, "train": train})


def report(run: str, step: int, loss: float, state: str = "running", start_from: str | None = None) -> dict[str, Any]:
    return {
        "run": run,
        "values": {"train.learning_rate": 1e-3},
        "start_from": start_from,
        "step": step,
        "workers": 2,
        "state": state,
        "message": "",
        "train/loss": loss,
    }


@pytest.fixture
def record(tmp_path: Path) -> SweepRecord:
    record = SweepRecord(SWEEP, config(tmp_path))
    first, second = (record.add(number, {"train.learning_rate": 1e-3 * number}) for number in (1, 2))
    first.take(report("lr-1", 10, 3.0), "train/loss")
    first.take(report("lr-1", 20, 2.5, "complete"), "train/loss")
    second.take(report("lr-2", 10, 4.0), "train/loss")
    second.take(report("lr-2.2", 20, 2.0, start_from="lr-1@10"), "train/loss")
    record.write()
    return record


def test_it_is_read_back(tmp_path: Path, record: SweepRecord) -> None:
    again = SweepRecord(SWEEP, config(tmp_path))
    assert again.trials == record.trials
    assert [trial.number for trial in again.unfinished()] == [2]
    assert [leg.run for leg in again.trials[2].legs] == ["lr-2", "lr-2.2"]
    assert not again.is_over, "trial 3 has not begun"
    assert [trial.number for trial in again.ranked()] == [2, 1]
    more = SWEEP.model_copy(update={"trials": 9, "workers": 4})
    assert SweepRecord(more, config(tmp_path, steps=500)).trials == record.trials


def test_another_sweep_of_the_name_is_refused(tmp_path: Path, record: SweepRecord) -> None:
    with pytest.raises(RunConflictError, match="space file: scheduler was 'none' and is now 'asha'"):
        SweepRecord(SWEEP.model_copy(update={"scheduler": "asha"}), config(tmp_path))
    with pytest.raises(RunConflictError, match=r"train\.seed was 0 and is now 1"):
        SweepRecord(SWEEP, config(tmp_path, seed=1))


def test_one_process_at_a_time(tmp_path: Path, record: SweepRecord) -> None:
    with record.locked(), pytest.raises(RunConflictError, match="being run now"), record.locked():
        pass


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"sweep": {}}', b"\x80\x04K\x01."])
def test_a_damaged_one_is_named(tmp_path: Path, record: SweepRecord, content: bytes) -> None:
    record.storage.write_atomic("sweep.json", content)
    with pytest.raises((DataError, ConfigError), match=r"sweep\.json"):
        SweepRecord(SWEEP, config(tmp_path))


def test_values_from_the_storage_are_those_of_the_space(tmp_path: Path, record: SweepRecord) -> None:
    record.trials[2].values = {"train.learning_rate": 1e9}
    record.write()
    with pytest.raises(DataError, match=r"trial 2 has train\.learning_rate 1000000000\.0, which is not in the sweep's"):
        SweepRecord(SWEEP, config(tmp_path))


def test_a_score_that_is_no_number_is_none(record: SweepRecord) -> None:
    trial = Trial(7, {})
    trial.take(report("lr-7", 10, float("nan")), "train/loss")
    trial.take(report("lr-7", 20, 1.0) | {"train/loss": None}, "train/loss")
    assert (trial.score, trial.step) == (None, 20)


def test_the_table_has_the_best_first(record: SweepRecord) -> None:
    record.add(3, {"train.learning_rate": 0.01}).state = "failed"
    record.trials[3].message = "it diverged"
    lines = summary(record).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["trial", "train.learning_rate", "step", "train/loss", "state"],
        ["lr-2.2", "0.001", "20", "2", "running"],
        ["lr-1", "0.001", "20", "2.5", "complete"],
    ]
    assert lines[-1] == "lr-3 failed: it diverged"


def test_the_picture_has_a_line_for_each_trial(record: SweepRecord) -> None:
    record.trials[2].points = [(10, 4.0), (20, 3.0), (10, 2.2), (20, 2.0)]
    told = record.told() | {"sweep": "<lr>"}
    svg = ElementTree.fromstring(sweep_chart(told))
    named = {"svg": "http://www.w3.org/2000/svg"}
    assert len(svg.findall(".//svg:g/svg:polyline", named)) == 3, "a trial that went back has two"
    titles = [title.text for title in svg.findall(".//svg:title", named)]
    assert titles[-1] == "lr-2: train.learning_rate 0.001; running at step 20, 2", "the best is drawn last, on top"
    assert json.dumps(told)
    assert ElementTree.fromstring(sweep_chart({"sweep": "new", "metric": "train/loss", "trials": []})) is not None
