"""Ray Tune's searchers and schedulers, as a sweep uses them: what ended before a resume counts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher

from elastictrain.config import TrainConfig
from elastictrain.sweep.choosing import Suggestions, scheduler_of, values_of
from elastictrain.sweep.record import SweepRecord
from elastictrain.sweep.space import Domain, Sweep

SPACE = {
    "train.learning_rate": Domain(loguniform=(1e-4, 1e-2)),
    "train.warmup_steps": Domain(integer=(5, 6)),
    "model.dropout": Domain(choice=(0.0, 0.1)),
}


def record(folder: Path, **fields: Any) -> SweepRecord:
    sweep = Sweep(**{"name": "s", "trials": 4, "space": SPACE} | fields)
    return SweepRecord(sweep, TrainConfig.from_dict({"run": {"storage": str(folder)}}))


def ended(record: SweepRecord, number: int, values: dict[str, Any], *points: tuple[int, float]) -> None:
    trial = record.add(number, values)
    trial.state, trial.points = "complete", list(points)


def test_values_are_drawn_by_seed_and_number_alone(tmp_path: Path) -> None:
    first = values_of(record(tmp_path))
    assert [told["number"] for told in first] == [1, 2, 3, 4]
    assert len({told["values"]["train.learning_rate"] for told in first}) == 4
    for told in first:
        assert 1e-4 <= told["values"]["train.learning_rate"] <= 1e-2
        assert told["values"]["train.warmup_steps"] in (5, 6)
        assert type(told["values"]["train.warmup_steps"]) is int
        assert told["values"]["model.dropout"] in (0.0, 0.1)
    resumed = record(tmp_path)
    ended(resumed, 2, first[1]["values"], (20, 3.0))
    assert values_of(resumed) == [first[0], first[2], first[3]]
    assert values_of(record(tmp_path, seed=1)) != first


def test_optuna_goes_on_with_what_it_was_told(tmp_path: Path) -> None:
    sweep = record(tmp_path, search="optuna", trials=14)
    for number in range(1, 12):  # the lower the better
        rate = 1e-2 * 0.7**number
        values = {"train.learning_rate": rate, "train.warmup_steps": 5, "model.dropout": 0.0}
        ended(sweep, number, values, (100, rate))
    waiting = sweep.add(12, {"train.learning_rate": 5e-3, "train.warmup_steps": 6, "model.dropout": 0.1})
    search = Suggestions(sweep)
    assert search.suggest("a")["trial"] == {"number": 12, "values": waiting.values}, "the one under way comes first"
    new = search.suggest("b")["trial"]
    assert new["number"] == 13
    assert new["values"].keys() == SPACE.keys()
    waiting.points.append((100, 5e-3))
    search.on_trial_complete("a", {"train/loss": 5e-3})
    search.on_trial_complete("b", error=True)
    assert search.suggest("c")["trial"]["number"] == 14
    assert search.suggest("d") == Searcher.FINISHED


@pytest.mark.parametrize(("loss", "decision"), [(9.0, "STOP"), (0.5, "CONTINUE")])
def test_asha_compares_with_the_trials_that_ended_before(tmp_path: Path, loss: float, decision: str) -> None:
    sweep = record(tmp_path, scheduler="asha", grace_steps=20)
    for number in (1, 2, 3):
        ended(sweep, number, {}, (10, 5.0), (20, float(number)), (60, 0.8))
    asha = scheduler_of(sweep, steps=100, at_a_time=1)
    trial = SimpleNamespace(trial_id="new")
    asha.on_trial_add(None, trial)
    assert asha.on_trial_result(None, trial, {"step": 10, "train/loss": 99.0}) == "CONTINUE"
    assert asha.on_trial_result(None, trial, {"step": 20, "train/loss": loss}) == decision
