"""Space files: what is wrong with one is said before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastictrain.config import TrainConfig
from elastictrain.errors import ConfigError
from elastictrain.sweep.space import Sweep, config_of

GOOD = """
name: lr-sweep
metric: train/loss
trials: 8
workers: 4
search: random
scheduler: asha
space:
  train.learning_rate: {loguniform: [1e-4, 1e-2]}
  model.dropout: {choice: [0, 0.1]}
  train.warmup_steps: {integer: [5, 50]}
"""


def load(folder: Path, text: str) -> Sweep:
    path = folder / "space.yaml"
    path.write_text(text)
    return Sweep.load(path, TrainConfig())


def test_a_space_file(tmp_path: Path) -> None:
    sweep = load(tmp_path, GOOD)
    assert sweep.space["train.learning_rate"].loguniform == (1e-4, 1e-2), "YAML reads 1e-4 as text"
    assert sweep.space["model.dropout"].choice == (0, 0.1)
    assert (sweep.mode, sweep.steps_between_reports(300), sweep.steps_of_grace(300)) == ("min", 15, 30)
    assert Sweep.model_validate(sweep.model_dump(mode="json", exclude_unset=True)) == sweep
    assert config_of(TrainConfig(), {"model.dropout": 0.1}, "x").model.dropout == 0.1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("train.learning_rate", "train.learning_rat", "unknown key train.learning_rat: did you mean train.learning_"),
        ("model.dropout", "modle.dropout", "the config has no field modle.dropout: did you mean model.dropout?"),
        ("model.dropout", "dropout", "the config has no field dropout: fields are written section.field"),
        ("[0, 0.1]", "[0, 1.5]", "space.model.dropout: model.dropout = 1.5: must be less than 1"),
        ("[0, 0.1]", "[0, high]", "model.dropout = 'high': must be a number"),
        ("[0, 0.1]", "[]", "choice"),
        ("{integer: [5, 50]}", "{integer: [50, 5]}", "integer [50, 5] is empty"),
        ("{integer: [5, 50]}", "{integer: [5, 50], choice: [1]}", "give one of choice, uniform, loguniform, integer"),
        ("{integer: [5, 50]}", "{normal: [5, 50]}", "normal"),
        ("loguniform: [1e-4", "loguniform: [0.0", "must begin above 0"),
        ("scheduler: asha", "scheduler: hyperband", "scheduler = 'hyperband': must be 'none', 'asha' or 'pbt'"),
        ("search: random", "search: magic", "search = 'magic': must be 'random', 'grid' or 'optuna'"),
        ("search: random", "search: grid", "search grid needs a choice of values for space.train.learning_rate"),
        ("metric: train/loss", "metric: eval/loss", "set metric to train/loss, or scheduler to none"),
        ("metric: train/loss", "metric: loss", "metric = 'loss': must be 'train/loss'"),
        ("trials: 8", "", "trials is missing"),
        ("trials: 8", "trails: 8", "unknown key trails: did you mean trials?"),
        ("train.warmup_steps", "train.steps", "space.train.steps is the same in all trials"),
        (
            "scheduler: asha\nspace:",
            "scheduler: pbt\nspace:\n  model.num_layers: {choice: [1, 2]}",
            "can't change whil",
        ),
        ("name: lr-sweep", "name: a/b", "name = 'a/b'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, GOOD.replace(old, new, 1))
    assert message in str(raised.value)
    assert "space.yaml" in str(raised.value)


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    text = "name: g\nsearch: grid\nspace: {train.seed: {choice: [1, 2]}, train.dtype: {choice: [fp32, bf16]}}"
    sweep = load(tmp_path, text)
    assert len(list(sweep.grid())) == 4
    assert list(sweep.grid())[1] == {"train.seed": 1, "train.dtype": "bf16"}
