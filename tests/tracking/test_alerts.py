"""The alert rules are what the code makes, and ask only for metrics that are exported."""

from __future__ import annotations

import re
from pathlib import Path

from elastictrain.tracking.alerts import ALERTS, text
from elastictrain.tracking.metrics import METRICS

COMMITTED = Path(__file__).parents[2] / "clusters" / "grafana" / "alerts.yaml"


def test_the_committed_file_is_what_the_code_makes() -> None:
    assert COMMITTED.read_text() == text(), "python -m elastictrain.tracking.alerts > clusters/grafana/alerts.yaml"


def test_conditions_name_metrics_that_there_are() -> None:
    known = {f"ray_{metric.name}" for metric in METRICS}
    for alert in ALERTS:
        named = re.findall(r"ray_\w+", alert.condition)
        assert named
        assert set(named) <= known
        assert alert.condition.count("(") == alert.condition.count(")")
