"""`elastictrain init`: the repository's own recipe, written where there is no repository."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from elastictrain import TrainConfig
from elastictrain.cli import app

ROOT = Path(__file__).parents[2]


def test_the_package_has_the_recipe_of_the_repository() -> None:
    packaged = (ROOT / "elastictrain" / "cli" / "llm_tiny.yaml").read_text()
    assert packaged == (ROOT / "jobs" / "llm_tiny.yaml").read_text(), "cp jobs/llm_tiny.yaml elastictrain/cli/"


def test_it_writes_a_config_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["init", "mine.yaml"])
    assert (done.exit_code, done.stdout) == (0, "elastictrain train mine.yaml\n")
    written = tmp_path / "mine.yaml"
    assert TrainConfig.load(written) == TrainConfig.load(ROOT / "jobs" / "llm_tiny.yaml")
    assert "jobs/" not in written.read_text()
    assert "elastictrain train mine.yaml" in written.read_text()


def test_it_writes_over_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    done = CliRunner().invoke(app, ["init", str(tmp_path / "mine.yaml")])
    assert (done.exit_code, (tmp_path / "mine.yaml").read_text()) == (2, "mine")
    nowhere = CliRunner().invoke(app, ["init", str(tmp_path / "no" / "mine.yaml")])
    assert nowhere.exit_code == 2
    assert "can't be written: No such file or directory" in nowhere.stderr
