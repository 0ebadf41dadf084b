"""What `status`, `report` and the summary tell of a run that lies in a storage."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from kept_run import BEGIN, KeptRun, run, told

from elastictrain.cli.summary import summary
from elastictrain.tracking.journal import read_journal
from elastictrain.tracking.report import build_report

ROOT = Path(__file__).parents[2]


def test_status_json_has_what_tools_read(kept: KeptRun) -> None:
    with kept.driven():
        found = json.loads(told(kept, "status", "quickstart", "--json").stdout)
    assert (found["run"], found["status"], found["step"], found["world_size"]) == ("quickstart", "running", 3, 2)
    assert [(w["rank"], w["pid"], w["node"], w["state"]) for w in found["workers"]] == [
        (0, 4710, "n0", "training"),
        (1, 4711, "n1", "training"),
    ]
    assert [(s["pid"], s["node"]) for s in found["standbys"]] == [(4713, "n0")]
    assert [n["node"] for n in found["nodes"]] == ["n0", "n1"]


def test_a_run_whose_driver_is_gone_is_interrupted(kept: KeptRun) -> None:
    with kept.driven():
        pass  # the lock's file stays, as after a SIGKILL
    found = json.loads(told(kept, "status", "quickstart", "--json").stdout)
    assert found["status"] == "interrupted"
    assert {w["state"] for w in found["workers"]} == {"unknown"}


def test_the_processes_of_a_driver_that_died_are_not_those_of_the_next(kept: KeptRun) -> None:
    """Somebody may end processes by their numbers, and these may be others' by now."""
    driver = json.loads(told(kept, "status", "quickstart", "--json").stdout)["driver_pid"]
    with kept.driven(f"{driver} on a-node"):
        assert json.loads(told(kept, "status", "quickstart", "--json").stdout)["status"] == "running"
    with kept.driven(f"{driver + 1} on a-node"):
        found = json.loads(told(kept, "status", "quickstart", "--json").stdout)
    assert (found["status"], found["step"]) == ("preparing", 3)
    assert found["workers"] == found["standbys"] == found["nodes"] == []


def test_a_run_that_never_had_a_lock_is_interrupted(kept: KeptRun) -> None:
    assert json.loads(told(kept, "status", "--json").stdout)["status"] == "interrupted"


def test_looking_does_not_take_the_lock(kept: KeptRun) -> None:
    with kept.driven():
        for _ in range(2):
            assert json.loads(told(kept, "status", "--json").stdout)["status"] == "running"


def test_an_ended_run_keeps_its_end(kept: KeptRun) -> None:
    kept.change_status(status="failed", message="ValueError: bad")
    output = told(kept, "status", "quickstart").stdout
    assert "failed" in output
    assert "ValueError: bad" in output


def test_a_loss_that_is_no_number_still_gives_json(kept: KeptRun) -> None:
    kept.change_status(loss=float("nan"))
    assert json.loads(told(kept, "status", "--json").stdout)["loss"] is None


def test_status_without_a_name_takes_the_newest_run(kept: KeptRun) -> None:
    other = KeptRun(kept.storage, "second")
    other.killed_and_recovered()
    assert json.loads(told(kept, "status", "--json").stdout)["run"] in ("quickstart", "second")
    other.change_status(updated_at=BEGIN + 100)
    assert json.loads(told(kept, "status", "--json").stdout)["run"] == "second"
    kept.change_status(updated_at=BEGIN + 200)
    assert json.loads(told(kept, "status", "--json").stdout)["run"] == "quickstart"


def test_status_in_words_names_the_workers_and_has_no_control_codes(kept: KeptRun) -> None:
    with kept.driven():
        output = told(kept, "status").stdout
    assert "run quickstart  step 3/4  running  loss 5.2500" in output
    assert "rank 1  training  step 3  worker-1  pid 4711  node n1" in output
    assert "standby  worker-3  pid 4713" in output
    assert "\x1b" not in output


def test_a_damaged_status_is_said_to_be(kept: KeptRun) -> None:
    (kept.folder / "status.json").write_text('{"run": "quickstart"}')
    message = told(kept, "status", status=2).stderr
    assert f"{kept.folder}/status.json is damaged" in message
    assert "world_size" in message


def test_a_run_without_a_status_yet_is_starting(kept: KeptRun) -> None:
    (kept.folder / "status.json").unlink()
    assert "starting" in told(kept, "status").output
    found = json.loads(told(kept, "status", "--json").stdout)
    assert (found["run"], found["status"], found["step"], found["workers"]) == ("quickstart", "starting", 0, [])


@pytest.mark.parametrize("command", ["status", "report", "checkpoints"])
def test_an_unknown_run_is_answered_with_the_near_one_and_the_place(kept: KeptRun, command: str) -> None:
    message = told(kept, command, "quikstart", status=2).stderr
    assert message.startswith("error: there is no run 'quikstart'")
    assert str(kept.storage) in message
    assert "Did you mean quickstart?" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("command", [["status"], ["report", "quickstart"], ["checkpoints", "quickstart"]])
def test_an_empty_storage_says_how_to_begin(tmp_path: Path, command: list[str]) -> None:
    message = run(*command, "--storage", tmp_path / "nothing", status=2).stderr
    assert f"no run in {tmp_path / 'nothing'}" in message
    assert "elastictrain train" in message


def test_folders_that_are_no_runs_are_not_listed(kept: KeptRun) -> None:
    (kept.storage / "data" / "shards").mkdir(parents=True)
    message = told(kept, "report", "x", status=2).stderr
    assert "There is quickstart." in message


def test_report_json_is_the_report_of_the_journal(kept: KeptRun) -> None:
    kept.completed()
    report = json.loads(told(kept, "report", "quickstart", "--json").stdout)
    assert report == json.loads(json.dumps(build_report(read_journal(kept.folder))))
    assert report["loss"] == [[1, 7.0], [2, 6.5], [3, 5.25], [4, 5.0]]
    assert report["failures"][0]["lost_steps"] == 1


def test_report_of_a_live_run_says_running_and_of_a_dead_one_interrupted(kept: KeptRun) -> None:
    with kept.driven():
        assert json.loads(told(kept, "report", "quickstart", "--json").stdout)["status"] == "running"
    assert json.loads(told(kept, "report", "quickstart", "--json").stdout)["status"] == "interrupted"


def test_report_in_words(kept: KeptRun) -> None:
    kept.completed()
    output = told(kept, "report", "quickstart").stdout
    assert "4 of 4, 64 samples" in output
    assert "final loss" in output
    assert "5.0000" in output
    assert "1, 1 survived, 1 step lost, first new step after 0.31 s" in output
    assert "step 3  rank 1 on node n1: SIGKILL; detected in 10 ms, first new step after 0.31 s from memory" in output
    assert "bit_exact" in output
    assert "def main():\n    return 1" in output


@pytest.mark.parametrize(
    ("gzip", "says"), [(2.0, "25 % more than gzip -9"), (5.0, "50 % fewer than gzip -9"), (2.5, "as many as gzip -9")]
)
def test_the_comparison_with_gzip_is_honest(kept: KeptRun, gzip: float, says: str) -> None:
    kept.completed(gzip_bits_per_byte=gzip)
    assert says in told(kept, "report", "quickstart").stdout


def test_report_html_is_one_file(kept: KeptRun, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert str(page) in told(kept, "report", "quickstart", "--html", page).stdout
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")


def test_a_report_that_can_not_be_written_says_where(kept: KeptRun, tmp_path: Path) -> None:
    page = tmp_path / "missing" / "report.html"
    message = told(kept, "report", "quickstart", "--html", page, status=2).stderr
    assert str(page) in message
    assert "No such file or directory" in message


def test_a_run_that_has_not_begun_has_no_report(tmp_path: Path) -> None:
    empty = KeptRun(tmp_path / "runs")
    assert "nothing to report yet" in told(empty, "report", "quickstart", status=2).stderr


def test_a_damaged_journal_is_said_to_be(kept: KeptRun) -> None:
    path = kept.folder / "journal" / "attempt-0001.jsonl"
    path.write_bytes(b"{broken\n" + path.read_bytes())
    assert "damaged at byte 0" in told(kept, "report", "quickstart", status=2).stderr


def test_the_summary_ends_with_where_things_are(kept: KeptRun) -> None:
    kept.completed()
    result = SimpleNamespace(
        report=kept.folder / "report.html",
        checkpoint=f"{kept.folder}/checkpoints/step-00000004",
        mlflow_uri="sqlite:///runs/mlflow.db",
        recorded=True,
        report_data=build_report(read_journal(kept.folder)),
    )
    lines = summary(result).splitlines()  # type: ignore[arg-type]  # as much of a Result as it reads
    assert lines[0].split() == ["run", "quickstart", "complete"]
    assert lines[-3].split() == ["report", str(kept.folder / "report.html")]
    assert lines[-2].split() == ["checkpoint", f"{kept.folder}/checkpoints/step-00000004"]
    assert lines[-1].split(maxsplit=1) == [
        "MLflow",
        f"{sys.executable} -m mlflow ui --backend-store-uri sqlite:///runs/mlflow.db",
    ]
    result.mlflow_uri = "https://me:secret@tracking.example:5000"
    assert summary(result).splitlines()[-1].split() == ["MLflow", "https://***@tracking.example:5000"]  # type: ignore[arg-type]  # as much of a Result as it reads


def test_the_summary_does_not_say_that_mlflow_has_what_it_lacks(kept: KeptRun) -> None:
    kept.completed()
    report = build_report(read_journal(kept.folder))
    warning = {"topic": "tracking", "message": "MLflow at http://127.0.0.1:1 takes nothing", "at_s": 1.0}
    result = SimpleNamespace(
        report=kept.folder / "report.html",
        checkpoint=None,
        mlflow_uri="http://127.0.0.1:1",
        recorded=False,
        report_data=report | {"warnings": [warning]},
    )
    told = summary(result)  # type: ignore[arg-type]  # as much of a Result as it reads
    missing = "not everything is there: http://127.0.0.1:1; the same command delivers the rest"
    assert told.splitlines()[-1].split(maxsplit=1) == ["MLflow", missing]
    assert told.count("127.0.0.1:1") == 1


def test_report_svg_is_a_picture(kept: KeptRun, tmp_path: Path) -> None:
    picture = tmp_path / "curve.svg"
    assert str(picture) in told(kept, "report", "quickstart", "--svg", picture).stdout
    assert picture.read_text().startswith("<svg")
