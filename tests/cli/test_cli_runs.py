"""`elastictrain runs`, `lineage` and `top`: many runs, one run's ancestry, a run as it goes on."""

import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from io import StringIO
from pathlib import Path

import pytest
from kept_run import BEGIN, KeptRun, told
from rich.console import Console

from elastictrain.cli.runs import find_run
from elastictrain.cli.top import View
from elastictrain.config import TrainConfig
from elastictrain.events import GenerationStarted, Member, RanksTimed, RunStarted, Warned
from elastictrain.tracking.journal import Journal

ROOT = Path(__file__).parents[2]


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
    assert "attempt 2  no end on record" in drawn
    with kept.driven():
        assert "attempt 2  running" in told(kept, "lineage", "quickstart").stdout
    assert "generation 1  worker_lost: 2 workers, steps 3 to 3, 0 steps of them stand" in drawn
    assert "generation 2  resume: 1 worker, no step, from checkpoint 2, order_exact" in drawn


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
