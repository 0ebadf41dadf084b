"""What `status`, `report`, `checkpoints` tell of a run that lies in a storage."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from kept_run import BEGIN, KeptRun
from rich.console import Console
from typer.testing import CliRunner, Result

from elastictrain.cli import app
from elastictrain.cli.runs import find_run
from elastictrain.cli.summary import summary
from elastictrain.cli.top import View
from elastictrain.config import TrainConfig
from elastictrain.events import GenerationStarted, Member, RanksTimed, RunStarted, Warned
from elastictrain.tracking.journal import Journal, read_journal
from elastictrain.tracking.report import build_report

ROOT = Path(__file__).parents[2]


def run(*arguments: str | Path, status: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == status, result.output
    return result


def told(kept: KeptRun, command: str, *arguments: str | Path, status: int = 0) -> Result:
    return run(command, *arguments, "--storage", kept.storage, status=status)


# status


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


# report


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
    told = summary(result)  # type: ignore[arg-type]
    missing = "not everything is there: http://127.0.0.1:1; the same command delivers the rest"
    assert told.splitlines()[-1].split(maxsplit=1) == ["MLflow", missing]
    assert told.count("127.0.0.1:1") == 1


# checkpoints


def test_checkpoints_json_lists_the_newest_first(kept: KeptRun) -> None:
    listed = json.loads(told(kept, "checkpoints", "quickstart", "--json").stdout)
    assert [c["step"] for c in listed] == [3, 2]
    assert listed[0]["uri"] == f"{kept.folder}/checkpoints/step-00000003"
    files = Path(listed[0]["uri"]).iterdir()
    assert listed[0]["bytes"] == sum(f.stat().st_size for f in files)
    assert len(listed[0]["sha256"]) == 64
    assert {c["verified"] for c in listed} == {None}


def test_whole_checkpoints_verify(kept: KeptRun) -> None:
    listed = json.loads(told(kept, "checkpoints", "quickstart", "--verify", "--json").stdout)
    assert {c["verified"] for c in listed} == {True}
    assert "verified" in told(kept, "checkpoints", "quickstart", "--verify").stdout


def flip_a_bit(folder: Path) -> str:
    shard = folder / "shard-00000-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    return "SHA-256"


def truncate(folder: Path) -> str:
    shard = folder / "shard-00000-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    return "truncated"


def lose_the_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "no manifest.json"


def lose_a_shard(folder: Path) -> str:
    (folder / "shard-00000-of-00001.safetensors").unlink()
    return "is not there"


def rewrite_the_manifest(folder: Path) -> str:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("5.0", "1.0"))
    return "the run's record says"


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, lose_the_manifest, lose_a_shard, rewrite_the_manifest])
def test_a_damaged_checkpoint_is_named_and_the_others_stand(kept: KeptRun, damage) -> None:  # type: ignore[no-untyped-def]
    problem = damage(kept.folder / "checkpoints" / "step-00000003")
    newest, older = json.loads(told(kept, "checkpoints", "quickstart", "--verify", "--json", status=1).stdout)
    assert newest["verified"] is False
    assert problem in newest["problem"]
    assert (older["step"], older["verified"], older["problem"]) == (2, True, None)
    assert "DAMAGED" in told(kept, "checkpoints", "quickstart", "--verify", status=1).stdout


def test_signatures_are_told_and_what_is_not_signed_is_damaged(kept: KeptRun, tmp_path: Path) -> None:
    key, other = tmp_path / "key", tmp_path / "other"
    for path, character in ((key, "5"), (other, "6")):
        path.touch(0o600)
        path.write_text(character * 64)

    def verified(*arguments: str | Path, status: int = 0) -> list[tuple[bool, str | None]]:
        out = told(kept, "checkpoints", "quickstart", "--verify", "--json", *arguments, status=status).stdout
        return [(c["verified"], c["signature"]) for c in json.loads(out)]

    assert verified() == [(True, "none")] * 2
    unsigned = told(kept, "checkpoints", "quickstart", "--verify", "--signing-key-file", key, status=1).stdout
    assert "DAMAGED" in unsigned
    assert "it is not signed" in unsigned
    assert "--signing-key-file" in told(kept, "checkpoints", "quickstart", "--sign", status=2).output
    with kept.driven():
        refused = told(kept, "checkpoints", "quickstart", "--sign", "--signing-key-file", key, status=2).output
        assert "is being trained now" in refused
    flip_a_bit(kept.folder / "checkpoints" / "step-00000003")
    signed = told(kept, "checkpoints", "quickstart", "--sign", "--signing-key-file", key, status=1).stdout
    assert ("DAMAGED" in signed, "verified  signed" in signed) == (True, True)
    assert verified("--signing-key-file", key, status=1) == [(False, None), (True, "valid")]
    assert verified(status=1) == [(False, "none"), (True, "unchecked")]
    assert verified("--signing-key-file", other, status=1) == [(False, None)] * 2


def test_what_was_never_completed_is_not_listed(kept: KeptRun) -> None:
    newest = kept.folder / "checkpoints" / "step-00000003"
    half_written = shutil.copytree(newest, newest.with_name("step-00000004"))
    lose_the_manifest(half_written)

    def listed() -> list[int]:
        return [c["step"] for c in json.loads(told(kept, "checkpoints", "quickstart", "--verify", "--json").stdout)]

    assert listed() == [3, 2]
    with kept.driven():
        assert listed() == [3, 2]
        lose_the_manifest(newest)  # as a prune under way does first
        assert listed() == [2]


def test_a_run_without_checkpoints_says_which_knob_makes_them(tmp_path: Path) -> None:
    empty = KeptRun(tmp_path / "runs")
    assert "checkpoint.every" in told(empty, "checkpoints", "quickstart").stdout
    assert json.loads(told(empty, "checkpoints", "quickstart", "--json").stdout) == []


def test_report_svg_is_a_picture(kept: KeptRun, tmp_path: Path) -> None:
    picture = tmp_path / "curve.svg"
    assert str(picture) in told(kept, "report", "quickstart", "--svg", picture).stdout
    assert picture.read_text().startswith("<svg")


# runs


def test_runs_lists_all_runs_newest_first(kept: KeptRun) -> None:
    other = KeptRun(kept.storage, "other")
    other.killed_and_recovered()
    other.completed()
    lines = told(kept, "runs").stdout.splitlines()
    assert lines[0].split()[:3] == ["run", "status", "steps"]
    listed = dict(line.split()[:2] for line in lines[1:])
    assert listed == {"quickstart": "interrupted", "other": "complete"}


def test_runs_compares_the_configs_of_those_it_is_given(kept: KeptRun) -> None:
    other = KeptRun(kept.storage, "other")
    other.config = TrainConfig.load(None, ["run.name=other", "train.steps=4", "train.seed=99"])
    other.killed_and_recovered()
    rows = json.loads(told(kept, "runs", "quickstart", "other", "--json").stdout)
    assert {row["run"]: row["differs"] for row in rows} == {
        "quickstart": {"train.seed": kept.config.train.seed},
        "other": {"train.seed": 99},
    }
    assert {(row["steps"], row["of_steps"], row["failures"], row["lost_steps"]) for row in rows} == {(3, 4, 1, 1)}
    assert "train.seed" in told(kept, "runs", "quickstart", "other").stdout
    assert "train.seed" not in told(kept, "runs").stdout


def test_a_run_that_has_told_nothing_is_left_out(kept: KeptRun) -> None:
    KeptRun(kept.storage, "silent")
    assert [row["run"] for row in json.loads(told(kept, "runs", "--json").stdout)] == ["quickstart"]


def test_a_damaged_run_is_told_of_and_hides_no_other(kept: KeptRun) -> None:
    other = KeptRun(kept.storage, "other")
    (other.folder / "journal" / "attempt-0001.jsonl").write_text("{no JSON}\n")
    asked = told(kept, "runs")
    assert "quickstart" in asked.stdout
    assert "run other is left out" in asked.stderr
    assert "is damaged" in told(kept, "runs", "other", status=2).stderr


def test_a_price_shows_in_report_and_runs(kept: KeptRun) -> None:
    other = KeptRun(kept.storage, "other")
    other.config = TrainConfig.load(None, ["run.name=other", "train.steps=4", "cluster.worker_cost_per_hour=2"])
    other.killed_and_recovered()
    assert "for a million tokens, at 2 for an hour of a worker" in told(kept, "report", "other").stdout
    page = kept.storage / "report.html"
    told(kept, "report", "other", "--html", page)
    assert "for a million tokens" in page.read_text()
    costs = {row["run"]: row["cost"] for row in json.loads(told(kept, "runs", "--json").stdout)}
    assert costs["quickstart"] is None
    assert costs["other"] == pytest.approx(2 * 2 * 3.9 / 3600, rel=1e-3)  # two workers for 3.9 s


# lineage


def test_lineage_draws_generations_and_checkpoints(kept: KeptRun) -> None:
    kept.completed()
    told_json = json.loads(told(kept, "lineage", "quickstart", "--json").stdout)
    (attempt,) = told_json["attempts"]
    first, second = attempt["generations"]
    assert [c["step"] for c in first["checkpoints"]] == [2]
    assert [c["step"] for c in second["checkpoints"]] == [3, 4]
    assert [c["parent"] and c["parent"][-1] for c in first["checkpoints"] + second["checkpoints"]] == [None, "2", "3"]
    assert told_json["best"] == told_json["last"] == second["checkpoints"][-1]["uri"]
    drawn = told(kept, "lineage", "quickstart").stdout
    assert "└─ attempt 1  complete, 5.50 s" in drawn
    assert "   ├─ generation 0  start: 2 workers, steps 1 to 2, from the beginning" in drawn
    assert "   └─ generation 1  worker_lost: 2 workers, steps 3 to 4, from memory, bit_exact" in drawn
    assert "      └─ checkpoint 4" in drawn
    assert "2.500 bits per byte  (best, last)" in drawn


def test_lineage_shows_what_a_resume_went_back_behind(kept: KeptRun) -> None:
    journal = Journal(kept.folder, 2)
    journal.append(RunStarted(BEGIN + 20, "quickstart", 2, kept.config.to_dict(), {}))
    members = (Member(0, "worker-0", 4720, "n0"),)
    journal.append(GenerationStarted(BEGIN + 22, 2, {"dp": 1}, 1, 3, "resume", "durable", "order_exact", members))
    drawn = told(kept, "lineage", "quickstart").stdout
    assert "generation 1  worker_lost: 2 workers, steps 3 to 3, 0 steps of them stand" in drawn
    assert "generation 2  resume: 1 worker, no step, from checkpoint 2, order_exact" in drawn


# top


def test_top_prints_once_where_there_is_no_terminal(kept: KeptRun) -> None:
    with kept.driven():
        shown = told(kept, "top", "quickstart").stdout
    assert "step 3/4" in shown
    assert "rank 1" in shown
    assert "■" in shown
    assert "recovered" in shown


def test_top_follows_the_journal_as_it_grows(kept: KeptRun) -> None:
    view = View(find_run(str(kept.storage), "quickstart"))

    def drawn() -> str:
        console = Console(file=StringIO(), width=100)
        console.print(view.draw())
        return console.file.getvalue()

    with kept.driven():
        assert "checkpoint written" in drawn()
        kept.tell(Warned(BEGIN + 4, "node", "it is getting late"))
        assert "it is getting late" in drawn()
        kept.generation(4.0, 2, 4, "resize")
        kept.tell(RanksTimed(BEGIN + 4.2, BEGIN + 4.1, 1, 3, 3, (0.1, 0.3)))
        assert "rank 1      ▇" in drawn()
    kept.completed()
    drawn()
    assert view.status.ended


def test_top_draws_on_a_terminal_until_the_run_ends(kept: KeptRun) -> None:
    """In a real terminal, where it takes the whole screen and leaves the last state behind."""
    main, side = pty.openpty()
    with kept.driven():
        command = [sys.executable, "-m", "elastictrain", "top", "quickstart", "--storage", str(kept.storage)]
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
        process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=environment)
        os.close(side)
        shown = ""
        while "step 3/4" not in shown:
            shown += os.read(main, 65536).decode(errors="ignore")
    kept.completed()
    with suppress(OSError):  # the terminal is gone with the process
        while more := os.read(main, 65536):
            shown += more.decode(errors="ignore")
    os.close(main)
    assert process.wait(timeout=60) == 0
    assert "step 4/4" in shown
    assert "complete" in shown


def test_the_json_of_runs_and_lineage_is_documented(kept: KeptRun) -> None:
    kept.completed()
    documented = set(re.findall(r"`([a-z0-9_]+)`", (ROOT / "docs" / "tracking.md").read_text()))
    (row,) = json.loads(told(kept, "runs", "--json").stdout)
    tree = json.loads(told(kept, "lineage", "quickstart", "--json").stdout)
    attempt = tree["attempts"][0]
    generation = attempt["generations"][0]
    for level in (row, tree, attempt, generation, generation["checkpoints"][0]):
        assert level.keys() <= documented
