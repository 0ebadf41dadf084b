"""What watches a run for a month holds no more of it than on the first day."""

from __future__ import annotations

import gc
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from example_events import Story

from elastictrain.cli.runs import find_run
from elastictrain.cli.top import View
from elastictrain.events import StepCommitted
from elastictrain.runtime.exporter import Exporter
from elastictrain.status import Status
from elastictrain.tracking.journal import Journal, history
from elastictrain.tracking.ledger import goodput
from elastictrain.tracking.lineage import Lineage
from elastictrain.tracking.running_ledger import MOST_STEPS, RunningLedger


def test_exporter_lineage_and_top_hold_no_more_steps_than_a_ledger_needs(tmp_path: Path) -> None:
    """9,000 steps with kills and checkpoints, read from a journal."""
    folder = tmp_path / "long"
    folder.mkdir()
    running = replace(Status.beginning("long", 0.0), status="running", driver_pid=os.getpid())
    (folder / "status.json").write_text(json.dumps(running.to_json()))
    journal = Journal(folder, 1)
    story = Story("long").start().generation()
    for _ in range(9):
        for event in story.steps(1000).checkpoint().kill().recover().events:
            journal.append(event)
        story.events.clear()
    before = _steps_alive()
    exporter = Exporter(folder, "long", lambda name, value, labels: None)
    exporter.export()
    lineage = Lineage(partial(history, folder))
    for event in history(folder):
        lineage.add([event])
    view = View(find_run(str(tmp_path), "long"))
    view.draw()
    assert _steps_alive() - before < 3 * (MOST_STEPS + 100)
    del exporter, lineage, view


def _steps_alive() -> int:
    gc.collect()
    return sum(type(found) is StepCommitted for found in gc.get_objects())


def test_a_ledger_asks_for_the_past_only_where_that_has_changed() -> None:
    story, asked = Story().start().generation(), []
    ledger = RunningLedger(lambda: asked.append(1) or iter(story.events), most_steps=100)

    def told() -> int:
        for event in story.events[ledger.num_added :]:
            ledger.add(event)
        assert ledger.goodput().run_us == goodput(story.events).run_us
        assert ledger.num_kept < 250
        return len(asked)

    story.steps(500).checkpoint().steps(40).kill().recover().steps(60).kill().recover(lost=9).steps(300)
    assert told() == 0
    story.wait(20).start().generation(cause="resume").steps(200)
    assert told() == 0
    story.generation(first_step=501, cause="resume").steps(300)
    assert told() == 1
