"""The report: what a user reads from it, and that its documentation leaves nothing out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from example_events import START_AT, Story, full_story

from elastictrain.events import (
    Cause,
    CheckpointWritten,
    FailureDetected,
    NodeLoad,
    NodesMeasured,
    Recovered,
    RunStarted,
    Skip,
    StepCommitted,
)
from elastictrain.status import Status
from elastictrain.tracking.exact_json import dumps
from elastictrain.tracking.html import render_html
from elastictrain.tracking.ledger import goodput
from elastictrain.tracking.lineage import Lineage
from elastictrain.tracking.metrics import COST, Latest, readings
from elastictrain.tracking.report import REPORT_VERSION, build_report
from elastictrain.tracking.wording import energy_text

DOCUMENT = Path(__file__).parents[2] / "docs" / "report.md"


def check_invariants(report: dict[str, Any]) -> None:
    """What holds for every report of a real run."""
    assert [step for step, _ in report["loss"]] == list(range(1, report["steps"] + 1))
    goodput = report["goodput"]
    buckets = [v for k, v in goodput.items() if k not in ("wall_s", "ratio")]
    assert sum(buckets) == pytest.approx(goodput["wall_s"], abs=1e-6)
    assert report["wall_s"] == goodput["wall_s"]
    indexes = [g["index"] for g in report["generations"]]
    assert indexes == sorted(set(indexes))


def test_the_whole_story() -> None:
    story = full_story()
    report = build_report(story.events)
    check_invariants(report)
    assert (report["version"], report["run"], report["status"]) == (REPORT_VERSION, "demo", "complete")
    assert (report["steps"], report["samples"]) == (200, 3200)
    assert report["sample_digest"] == story.chain
    assert [(g["index"], g["attempt"], g["first_step"]) for g in report["generations"]] == [
        (1, 1, 1),
        (2, 1, 81),
        (3, 1, 121),
        (4, 2, 101),
    ]
    assert report["generations"][0]["members"][1] == {"rank": 1, "worker": "worker-1", "pid": 4001, "node": "node-1"}
    assert [(c["step"], c["removed"]) for c in report["checkpoints"]] == [
        (50, True),
        (100, False),
        (160, False),
        (200, False),
    ]
    assert report["evaluation"]["bits_per_byte"] == 1.93
    assert [w["topic"] for w in report["warnings"]] == ["tracking", "checkpoint"]
    assert report["rejected_checkpoints"][0]["problem"] == "sha256 of shard 0 differs"
    assert [(a["attempt"], a["status"]) for a in report["attempts"]] == [(1, None), (2, "complete")]
    assert report["throughput"]["tokens_per_s"] == pytest.approx(2048 / 0.494, rel=1e-3)


def test_how_even_the_experts_were_is_told() -> None:
    gauges = {"busiest_expert": 1.25, "dropped_tokens": 0.0625}
    events = [replace(e, gauges=gauges) if isinstance(e, StepCommitted) else e for e in full_story().events]
    report = build_report(events)
    assert report["gauges"]["busiest_expert"] == [[step, 1.25] for step in range(1, 201)]
    assert "times the mean; 6.2% of tokens dropped" in render_html(report)
    dense = build_report(full_story().events)
    assert dense["gauges"] == {}
    assert "busiest" not in render_html(dense)


def test_what_mlflow_has_taken_after_all_is_no_warning() -> None:
    report = build_report(full_story().events, delivered=True)
    assert [w["topic"] for w in report["warnings"]] == ["checkpoint"]


def test_failures_count_from_the_fault() -> None:
    first, second = build_report(full_story().events)["failures"]
    assert first["cause"] == {"kind": "signal", "message": "SIGKILL", "traceback": ""}
    assert (first["ranks"], first["step"], first["node"], first["pid"]) == ([1], 81, "node-1", 4001)
    assert first["at_s"] == pytest.approx(6 + 80 * 0.51 + 0.2)
    assert first["detected_s"] == pytest.approx(0.05)
    assert first["recovered_s"] == pytest.approx(0.05 + 0.4 + 0.51)
    assert (first["lost_steps"], first["source"], first["continuation"]) == (1, "memory", "bit_exact")
    assert (first["injected"], second["injected"]) == (True, False)


def test_lost_steps_count_recoveries_and_resumes() -> None:
    # two steps in flight, and steps 101 to 130 that the resume went back behind
    assert build_report(full_story().events)["lost_steps"] == 2 + 30


def test_a_driver_that_died_is_a_failure_healed_by_the_next_one() -> None:
    story = Story().start().generation().steps(10).kill().recover().steps(9).inherit(untold=2, lost=1).end()
    report = build_report(story.events)
    check_invariants(report)
    assert report["steps"] == 23
    assert [a["status"] for a in report["attempts"]] == [None, "complete"]
    killed, driver = report["failures"]
    assert (driver["kind"], driver["ranks"], driver["pid"]) == ("driver_lost", [], 77)
    assert (driver["lost_steps"], driver["source"]) == (1, "memory")
    assert report["lost_steps"] == killed["lost_steps"] + 1
    assert report["median_recovery_s"] == killed["recovered_s"], "that somebody was slow to submit again is not counted"


def test_steps_lost_with_the_driver_count_once() -> None:
    """Three steps on record and one that was not are done again: all four belong to the driver's death."""
    story = Story().start().generation().steps(10).wait(9).start()
    cause = Cause("unknown", "gone")
    story.tell(FailureDetected(story.clock - 9, story.clock, 1, "driver_lost", (), "example", 77, cause, 11))
    story.generation(first_step=8, cause="resume").steps(1)
    story.tell(Recovered(story.clock, 2, 8, 4, "durable", "bit_exact"))
    story.kill().recover(lost=1)
    report = build_report(story.events)
    assert [f["lost_steps"] for f in report["failures"]] == [4, 1]
    assert report["lost_steps"] == 5


def test_a_loss_of_a_rolled_back_step_is_the_one_that_counts() -> None:
    story = Story().start().generation().steps(10, loss=9.0).kill().recover(lost=4).steps(3, loss=1.0)
    report = build_report(story.events)
    check_invariants(report)
    assert report["loss"][:7] == [[s, 9.0] for s in range(1, 8)]
    assert report["loss"][8:] == [[s, 1.0] for s in (9, 10, 11)]


def test_skipped_steps_say_which_samples_did_not_count() -> None:
    story = Story().start().generation().steps(4).steps(1, loss=math.nan, skipped=Skip("loss", None, 5)).steps(2)
    story.kill().recover(lost=4).steps(4).steps(1, loss=9.5, skipped=Skip("spike", 3.25, 7))
    report = build_report(story.events)
    check_invariants(report)
    assert report["skipped_steps"] == [  # step 5 was done again, and then it counted
        {
            "step": 10,
            "first_step": 7,
            "reason": "spike",
            "loss": 9.5,
            "limit": 3.25,
            "first_sample": 6 * 16,
            "num_samples": 4 * 16,
            "at_s": story.clock - 0.01 - START_AT,
        }
    ]


def test_two_failures_healed_by_one_recovery() -> None:
    story = Story().start().generation().steps(3).kill(rank=0).kill(rank=1, partial_s=0.1).recover(lost=1)
    report = build_report(story.events)
    assert [f["lost_steps"] for f in report["failures"]] == [1, 1]
    assert report["lost_steps"] == 1
    assert report["failures"][0]["recovered_s"] > report["failures"][1]["recovered_s"]


def test_a_failure_that_ended_the_run() -> None:
    cause = Cause("exception", "ValueError: bad", "Traceback ...", "ValueError")
    report = build_report(Story().start().generation().steps(2).bug().end("failed", cause).events)
    check_invariants(report)
    (failure,) = report["failures"]
    assert (failure["recovered_s"], failure["lost_steps"], failure["source"]) == (None, None, None)
    assert report["status"] == "failed"
    assert report["attempts"][-1]["cause"]["traceback"] == "Traceback ..."


def test_the_status_of_a_run_without_an_end_depends_on_who_asks() -> None:
    story = Story().start().generation().steps(2)
    assert build_report(story.events)["status"] == "interrupted"
    assert build_report(story.events, now=story.clock)["status"] == "running"
    assert build_report(story.end("stopped").events, now=story.clock)["status"] == "stopped"


def test_a_run_that_has_only_begun() -> None:
    report = build_report(Story().start().events)
    check_invariants(report)
    assert (report["steps"], report["loss"], report["sample_digest"], report["evaluation"]) == (0, [], "", None)


def test_losses_survive_as_strict_json() -> None:
    story = Story().start().generation().steps(1, loss=0.1 + 0.2).steps(1, loss=math.nan).steps(1, loss=-math.inf)
    text = dumps(build_report(story.events))
    loss = json.loads(text, parse_constant=pytest.fail)["loss"]
    assert loss == [[1, 0.1 + 0.2], [2, "NaN"], [3, "-Infinity"]]
    assert math.isnan(float(loss[1][1]))


def test_secrets_in_uris_are_not_shown() -> None:
    story = Story(overrides=("run.storage=s3://KEY:hunter2@bucket/x?session_token=hunter3",)).start().generation()
    story.trouble()
    story.tell(CheckpointWritten(story.clock, 1, "s3://KEY:hunter2@bucket/c", 1, "", 1, 1, "", 1.0, {}))
    start = story.events[0]
    assert isinstance(start, RunStarted)
    assert "hunter2" in str(start.config)
    text = dumps(build_report(story.events))
    assert "hunter" not in text
    assert "me:secret" not in text
    assert "s3://***@bucket/c" in text


def test_no_start_no_report() -> None:
    with pytest.raises(ValueError, match="no run to report"):
        build_report([])


def test_the_workers_seconds_add_up_to_their_total() -> None:
    report = build_report(full_story().events)
    seconds = {k: v for k, v in report["worker_seconds"].items() if k != "total"}
    assert seconds.keys() == {k for k in report["goodput"] if k not in ("wall_s", "ratio")}
    assert sum(seconds.values()) == pytest.approx(report["worker_seconds"]["total"], abs=1e-6)
    # two workers but for the second generation's nine steps and what followed them
    assert report["wall_s"] < report["worker_seconds"]["total"] < 2 * report["wall_s"]


def test_a_price_gives_the_cost_of_all_time_but_that_between_attempts() -> None:
    story = Story(overrides=("cluster.worker_cost_per_hour=3.6",)).start(6).generation().steps(100)
    story.wait(1000).start(4).generation(cause="resume").steps(100)
    report = build_report(story.events)
    workers = report["worker_seconds"]
    cost = report["cost"]
    assert cost["total"] == pytest.approx((workers["total"] - workers["down"]) * 1e-3)
    assert cost["per_million_tokens"] == pytest.approx(cost["total"] / (200 * 2048) * 1e6)
    ledger = goodput(story.events)
    [told] = [
        r.value for r in readings(Status.beginning("demo", 0.0), Latest(story.events), ledger) if r.metric is COST
    ]
    assert told == cost["total"]
    ended = Lineage(lambda: story.events).add(story.end().events).metrics
    assert [value for name, value, _, _ in ended if name == "cost/total"] == [
        build_report(story.events)["cost"]["total"]
    ]
    assert build_report(full_story().events)["cost"] is None
    nothing_yet = build_report(Story(overrides=("cluster.worker_cost_per_hour=1",)).start().events)
    assert nothing_yet["cost"]["per_million_tokens"] is None


def test_energy_is_that_of_the_nodes_that_tell_and_of_the_tokens_until_then() -> None:
    story = Story().start(6).generation().steps(100)
    silent, tells = NodeLoad("a", 0.5, 1, 2), NodeLoad("b", 0.5, 1, 2, energy_j=500.0)
    for _ in range(2):
        story.tell(NodesMeasured(story.clock, story.step, (silent, tells)))
    story.steps(50)  # nobody has asked since
    energy = build_report(story.events)["energy"]
    assert energy == {
        "joules": 1000.0,
        "nodes_that_tell": 1,
        "nodes": 2,
        "joules_per_million_tokens": pytest.approx(1000.0 / (100 * 2048) * 1e6),
    }
    assert (
        energy_text(energy) == "0.000278 kWh of processors and GPUs on 1 of 2 nodes, 0.00136 kWh for a million tokens"
    )
    assert build_report(full_story().events)["energy"] is None


def test_the_timeline_adds_up_to_the_ledger() -> None:
    report = build_report(full_story().events)
    told = report["timeline"]
    assert {len(values) for values in (told["tokens"], *told["seconds"].values())} == {120}
    for bucket, seconds in told["seconds"].items():
        assert sum(seconds) == pytest.approx(report["goodput"][bucket], abs=1e-6)
    assert sum(told["tokens"]) == pytest.approx(200 * 2048)
    assert told["part_s"] * 120 == pytest.approx(report["wall_s"])


def keys(value: Any, path: str = "") -> Iterator[str]:
    """All keys of the format; not those of the user's config, environment, layout and phases."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield key
            if key not in ("config", "environment", "layout", "phases_s"):
                yield from keys(child)
    elif isinstance(value, list):
        for child in value:
            yield from keys(child)


def test_the_documentation_names_every_key() -> None:
    story = full_story()
    story.bug().end("failed", Cause("exception", "ValueError: bad", "Traceback ..."))
    documented = set(re.findall(r"`([a-z0-9_]+)`", DOCUMENT.read_text()))
    assert set(keys(build_report(story.events))) - documented == set()
    assert f"version {REPORT_VERSION}." in DOCUMENT.read_text()
