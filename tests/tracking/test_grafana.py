"""The dashboard is what the code makes, and asks only for metrics that are exported."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from example_events import full_story

from elastictrain.events import GenerationStarted, StepCommitted
from elastictrain.status import Status, WorkerStatus
from elastictrain.tracking.grafana import PANELS, dashboard
from elastictrain.tracking.ledger import goodput
from elastictrain.tracking.metrics import COST, METRICS, Latest, readings

COMMITTED = Path(__file__).parents[2] / "clusters" / "grafana" / "elastictrain.json"


def test_the_committed_file_is_what_the_code_makes() -> None:
    again = "python -m elastictrain.tracking.grafana > clusters/grafana/elastictrain.json"
    assert json.loads(COMMITTED.read_text()) == dashboard(), again


def test_every_query_names_metrics_and_labels_that_there_are() -> None:
    known = {f"ray_{metric.name}": {"run", *metric.labels} for metric in METRICS}
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            (name,) = re.findall(r"ray_\w+", target["expr"])
            by = re.findall(r"by \(([^)]*)\)", target["expr"])[0].split(", ")
            assert set(by) == known[name]
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) == known[name]


def test_every_metric_is_on_the_dashboard_or_known_not_to_be() -> None:
    shown = {metric.name for panel in PANELS for metric in panel.metrics}
    left_out = {"elastictrain_steps", "elastictrain_running", "elastictrain_checkpoint_written_at"}  # for alarms
    assert shown | left_out == {metric.name for metric in METRICS}


def test_panels_do_not_cover_each_other() -> None:
    places = [tuple(panel["gridPos"].values()) for panel in dashboard()["panels"]]
    assert len(set(places)) == len(places)
    assert all(x + w <= 24 for x, _, w, _ in places)


def test_names_are_unique_and_told_with_the_labels_that_they_have() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    story = full_story()
    last = [e for e in story.events if isinstance(e, GenerationStarted)][-1]
    status = replace(
        Status.beginning("demo", story.clock),
        loss=2.5,
        last_recovery_s=0.4,
        world_size=2,
        generation=last.index,
        workers=(WorkerStatus(0, "worker-0", 1, "node-0", "forward", 5),),
    )
    experts = {"busiest_expert": 1.2, "dropped_tokens": 0.1}
    events = [replace(e, gauges=experts) if isinstance(e, StepCommitted) else e for e in story.events]
    told = list(readings(status, Latest(events), goodput(events)))
    assert {reading.metric for reading in told} == set(METRICS) - {COST}  # only with a price
    for reading in told:
        assert tuple(reading.labels) == reading.metric.labels
    assert len({(r.metric, *r.labels.items()) for r in told}) == len(told)


def test_the_documentation_names_every_metric_with_its_labels() -> None:
    text = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text()
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        assert f"| `ray_{metric.name}` | {metric.meaning}. | {labels} |" in text
