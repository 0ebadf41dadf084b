"""The commands from outside: exit status, what goes to which stream, and what is not even imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kept_run import KeptRun
from typer.main import get_command
from typer.testing import CliRunner

from elastictrain import TrainConfig, __version__
from elastictrain.cli import app, plain_errors
from elastictrain.errors import CheckpointError, InfrastructureError, RunConflictError, UserCodeError

ROOT = Path(__file__).parents[2]
RECIPE = "jobs/llm_tiny.yaml"
COMMAND = [sys.executable, "-c", "from elastictrain.cli import main; main()"]
NEW = "run.name=never-begun"
HEAVY = {"torch", "ray", "deepspeed", "mlflow", "pyarrow", "transformers", "numpy"}


def process(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


def test_a_dry_run_prints_the_resolved_config() -> None:
    done = process(*COMMAND, "train", RECIPE, "train.steps=7", "faults=[]", NEW, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert TrainConfig.from_dict(yaml.safe_load(done.stdout)) == TrainConfig.load(
        ROOT / RECIPE, ["train.steps=7", "faults=[]", NEW]
    )


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    result = CliRunner().invoke(app, ["train", str(ROOT / RECIPE), f"run.storage={storage}", "--dry-run"])
    assert result.exit_code == 0
    assert not storage.exists()


@pytest.mark.parametrize(
    "arguments", [["train", RECIPE, NEW, "--dry-run"], ["--help"], ["schema"], ["train", "none.yaml"]]
)
def test_what_trains_nothing_imports_nothing_heavy(arguments: list[str]) -> None:
    done = process(sys.executable, "-X", "importtime", *COMMAND[1:], *arguments)
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "elastictrain.config" in imported or arguments == ["--help"]
    assert {name.partition(".")[0] for name in imported} & HEAVY == set()


@pytest.mark.parametrize("script", [[*COMMAND, "train"], [sys.executable, "jobs/train_llm.py", "--config"]])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["jobs/llm_tny.yaml"], "Did you mean jobs/llm_tiny.yaml?"),
        ([RECIPE, "train.stpes=5"], "did you mean train.steps?"),
        ([RECIPE, "elastic.max_workers=3"], "Legal world sizes are 1, 2, 4"),
    ],
)
def test_a_bad_config_is_one_line_on_stderr(script: list[str], arguments: list[str], says: str) -> None:
    done = process(*script, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_a_dry_run_refuses_what_the_run_of_its_name_would(tmp_path: Path) -> None:
    kept = KeptRun(tmp_path)
    kept.killed_and_recovered()
    given = ["run.name=quickstart", f"run.storage={tmp_path}", "faults=[]"]
    begun_with = TrainConfig.load(ROOT / RECIPE, given).to_dict()
    (kept.folder / "config.json").write_text(json.dumps(begun_with))
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    for override, status, says in (
        ("train.steps=3", 0, "steps: 3"),
        ("train.steps=2", 3, "train.steps 2 is less than the 3 steps"),
        ("train.learning_rate=0.5", 3, "can't go on with this config: train.learning_rate was"),
    ):
        result = CliRunner().invoke(app, ["train", str(ROOT / RECIPE), *given, override, "--dry-run"])
        assert (result.exit_code, says in result.output) == (status, True), result.output
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.corpus=nowhere", "data.corpus nowhere is not there"),
        ("model={kind: huggingface, path: nowhere}", "model.path nowhere has no config.json"),
        ("checkpoint.signing_key_file=/nowhere/key", "can't read checkpoint.signing_key_file /nowhere/key"),
    ],
)
def test_a_dry_run_looks_for_what_the_config_names(override: str, says: str) -> None:
    result = CliRunner().invoke(app, ["train", str(ROOT / RECIPE), "--dry-run", override])
    assert result.exit_code == 2
    assert says in result.stderr


def test_the_package_is_a_command_too() -> None:
    done = process(sys.executable, "-m", "elastictrain", "--version")
    assert done.stdout == f"{__version__}\n"


def test_debug_adds_the_traceback() -> None:
    result = CliRunner().invoke(app, ["--debug", "train", "none.yaml"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "error: there is no config file none.yaml" in result.stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RunConflictError("taken"), 3),
        (UserCodeError("ValueError"), 4),
        (InfrastructureError("no disk"), 5),
        (CheckpointError("none"), 6),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_ends_with_its_own_status(
    error: BaseException, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, plain_errors():
        raise error
    assert ended.value.code == status
    said = capsys.readouterr().err
    assert said == ("interrupted\n" if status == 130 else f"error: {error}\n")


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), plain_errors():
        _ = 1 / 0


def test_a_reader_that_goes_away_leaves_no_traceback() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c 'from elastictrain.cli import main; main()' schema | head -1"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"{__version__}\n"


def test_help_is_a_manual_that_fits_80_columns() -> None:
    text = CliRunner().invoke(app, ["--help"]).stdout
    for command in get_command(app).commands:  # type: ignore[attr-defined]  # it is a group
        assert f"\n  {command} " in text
    assert "elastictrain train llm_tiny.yaml" in text
    assert "Exit status" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_mistyped_command_gets_the_near_one() -> None:
    result = CliRunner().invoke(app, ["chekpoints"])
    assert result.exit_code == 2
    assert "checkpoints" in result.stderr


def test_the_schema_is_that_of_the_config() -> None:
    assert json.loads(CliRunner().invoke(app, ["schema"]).stdout) == TrainConfig.model_json_schema()


@pytest.mark.parametrize("script", [[*COMMAND, "train"], [sys.executable, "jobs/train_llm.py", "--config"]])
def test_a_complete_run_says_so_and_does_nothing(kept: KeptRun, script: list[str]) -> None:
    kept.completed()
    journal = list((kept.folder / "journal").iterdir())
    done = process(*script, RECIPE, "train.steps=4", f"run.storage={kept.storage}")
    assert done.returncode == 0, done.stderr
    assert "run quickstart  complete" in done.stdout
    assert "nothing to do" in done.stdout
    assert list((kept.folder / "journal").iterdir()) == journal
    assert (kept.folder / "report.html").stat().st_size  # its driver may have died before it was written


def test_the_job_script_explains_itself() -> None:
    done = process(sys.executable, "jobs/train_llm.py", "--help")
    assert done.returncode == 0
    assert "--config" in done.stdout
