"""Code of the user's that a config names: found or refused in plain words, and never one that a storage names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from elastictrain import TrainConfig
from elastictrain.cli import app
from elastictrain.data.samples import TensorSamples, look_at_named, named_samples
from elastictrain.errors import ConfigError, DataError, UserCodeError, in_a_line
from elastictrain.runtime.home import settled
from elastictrain.workloads import build_workload
from elastictrain.workloads.named import check_named, load_named

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "docs" / "examples" / "digits.py"
MARKER = "import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\n"


def config(workload: str, samples: str | None = None) -> TrainConfig:
    return TrainConfig.from_dict({"model": {"kind": "own", "workload": workload}, "data": {"samples": samples}})


def test_the_example_is_the_same_on_every_rank_and_learns_from_all_samples() -> None:
    digits = config(f"{DIGITS}:Digits", f"{DIGITS}:samples")
    workload = build_workload(digits, 0)
    before = torch.random.get_rng_state()
    one, other = workload.build(3), workload.build(3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    found = look_at_named(digits)
    assert (found.num_samples, found.num_validation_samples) == (1572, 225)
    assert found == look_at_named(digits)
    batch = named_samples(digits, "train").read([5, 0])
    assert (batch["image"].shape, batch["digit"].shape) == ((2, 1, 8, 8), (2,))
    assert torch.equal(named_samples(digits, "train").read([0])["image"], batch["image"][1:])
    loss, count = workload.evaluate(one, batch)
    assert count == workload.num_tokens(batch) == 2
    assert one.training
    assert loss / count == pytest.approx(2.3, abs=0.7), "it knows nothing yet"
    assert [name for name, p in one.named_parameters() if not workload.decays(name, p)] == [
        "0.bias", "1.weight", "1.bias", "4.bias", "5.weight", "5.bias", "10.bias",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("nowhere.py:Digits", "there is no file nowhere.py"),
        ("no_such_package.module:Digits", "no package no_such_package is installed"),
        (f"{DIGITS}:Letters", "has nothing named Letters"),
        (f"{DIGITS}:__name__", "has a str, which can't be called,"),
        (f"{DIGITS}:nn.Module", "must match"),
        ("builtins:repr", "makes a str without build, outline, loss"),
    ],
)
def test_what_is_no_workload_is_refused(named: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_workload(config(named), 0)


def test_what_takes_no_config_is_told_with_its_traceback() -> None:
    with pytest.raises(UserCodeError, match=r"Traceback(.|\n)*TypeError(.|\n)*can't be called with the config"):
        build_workload(config(f"{DIGITS}:samples"), 0)


def test_what_the_code_raises_is_told_with_its_traceback(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("def fails():\n    raise ValueError('too early')\nfails()\n")
    told = r"line 2, in fails(.|\n)*ValueError: too early(.|\n)*can't be imported"
    with pytest.raises(UserCodeError, match=told) as failed:
        load_named("model.workload", f"{file}:Model")
    line, traceback = in_a_line(failed.value)
    assert re.fullmatch(r"ValueError: too early \(model.workload .*: .*broken.py can't be imported\)", line)
    assert traceback.startswith("Traceback (most recent call last):")
    assert in_a_line(ValueError("a\nb")) == ("ValueError: a", "")
    file.write_text("def Model(config): return config\n")
    assert load_named("model.workload", f"{file}:Model")(7) == 7, "what failed is read again"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model": {"kind": "own"}}, "set both or neither"),
        ({"model": {"workload": "a.py:B"}}, "set both or neither"),
        ({"model": {"kind": "own", "workload": "a.py"}}, "must match"),
        ({"data": {"samples": "a.py:b"}}, "needs model.kind own, not transformer"),
        (
            {
                "model": {"kind": "own", "workload": "a.py:B"},
                "parallel": {"layout": "manual", "pp": 2},
            },
            "can't split model.kind own",
        ),
    ],
)
def test_what_does_not_go_together_is_told(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TrainConfig.from_dict(fields)


def test_a_dry_run_looks_for_the_file_and_runs_nothing_of_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"{MARKER}class M: ...\ndef s(): ...\n")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"model: {{kind: own, workload: '{file}:M'}}\ndata: {{samples: '{file}:s'}}\n")
    assert CliRunner().invoke(app, ["train", str(recipe), "--dry-run"]).exit_code == 0
    assert not file.with_suffix(".ran").exists()
    missing = CliRunner().invoke(app, ["train", str(recipe), "--dry-run", "model.workload=other.py:M"])
    assert (missing.exit_code, "there is no file other.py" in missing.stderr) == (2, True)
    misspelt = CliRunner().invoke(app, ["train", str(recipe), "--dry-run", f"model.workload={file}:m"])
    assert (misspelt.exit_code, "mine.py has nothing named m: it has" in misspelt.stderr) == (2, True)
    assert not file.with_suffix(".ran").exists()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("class Modle: ...\n", "has nothing named Model: it has Modle"),
        ("_a = 1\n", "has nothing named Model: it has nothing"),
        ("def f(:\n", "can't be read as Python: invalid syntax"),
        ("from elsewhere import Model\n", None),
        ("if True:\n    from elsewhere import a as Model\n", None),
        ("from elsewhere import *\n", None),
        ("globals()['Mo' + 'del'] = 1\n", None),
        ("def __getattr__(name): ...\n", None),
        ("Other, (Model, _) = 1, (2, 3)\n", None),
    ],
)
def test_a_name_is_looked_for_without_running_the_file(tmp_path: Path, code: str, says: str | None) -> None:
    file = tmp_path / "mine.py"
    file.write_text(code)
    if says is None:
        check_named("model.workload", f"{file}:Model")
    else:
        with pytest.raises(ConfigError, match=says):
            check_named("model.workload", f"{file}:Model")


def test_the_planner_says_that_it_can_not_count_it(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"model: {{kind: own, workload: '{DIGITS}:Digits'}}\n")
    told = CliRunner().invoke(app, ["plan", str(recipe)])
    assert (told.exit_code, "the planner can't count the layers of" in told.stderr) == (2, True)


def test_files_are_absolute_for_the_workers_and_relative_in_a_submitted_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert settled(config("mine.py:M")).model.workload == f"{tmp_path}/mine.py:M"
    assert settled(config("some.package:M")).model.workload == "some.package:M"
    job = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    assert settled(config("mine.py:M")).model.workload == "mine.py:M"


def test_samples_are_named_and_of_one_length(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="of one length"):
        TensorSamples({"a": torch.zeros(2), "b": torch.zeros(3)})
    file = tmp_path / "none.py"
    file.write_text(
        "import torch\nfrom elastictrain.data.samples import TensorSamples\n"
        "def samples(config, split): return TensorSamples({'x': torch.zeros(0)})\n"
    )
    with pytest.raises(DataError, match="has no samples of the split train"):
        look_at_named(config(f"{DIGITS}:Digits", f"{file}:samples"))
