"""Alert rules for Prometheus, made from the metrics (pure): `python -m elastictrain.tracking.alerts` prints them.

clusters/grafana/alerts.yaml is what it prints, and docs/operations.md has a section on each; tests hold the three
together. Thresholds are for long runs, and are to be changed there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from elastictrain.tracking import metrics as m
from elastictrain.tracking.grafana import RAY_PREFIX
from elastictrain.tracking.metrics import Metric


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that a person should look at."""

    name: str
    condition: str
    """PromQL; true for `hold` before it is told."""
    hold: str
    summary: str


def _of(metric: Metric, back: str = "") -> str:
    """The metric of each run, whichever process exported it; so long ago, if `back` says so."""
    return f"max by (run) ({RAY_PREFIX}{metric.name}{f' offset {back}' if back else ''})"


ALERTS = (
    Alert("ElastictrainNotTraining", f"{_of(m.RUNNING)} == 0", "15m", "has not been training for 15 minutes"),
    Alert(
        "ElastictrainNoProgress",
        f"({_of(m.STEP)} - {_of(m.STEP, '30m')} <= 0) and ({_of(m.RUNNING)} == 1)",
        "1m",
        "has committed no step for 30 minutes, though it trains",
    ),
    Alert(
        "ElastictrainCheckpointOld",
        f"time() - {_of(m.CHECKPOINT_AT)} > 4 * 3600",
        "1m",
        "has had no durable checkpoint for 4 hours",
    ),
    Alert(
        "ElastictrainFailsOften",
        f"{_of(m.FAILURES)} - {_of(m.FAILURES, '1h')} > 10",
        "1m",
        "has failed more than 10 times in an hour",
    ),
    Alert("ElastictrainGoodputLow", f"{_of(m.GOODPUT)} < 0.5", "1h", "spends less than half of its time on training"),
)


def rules() -> dict[str, Any]:
    """The rules as Prometheus reads them."""
    return {"groups": [{"name": "elastictrain", "rules": [_rule(alert) for alert in ALERTS]}]}


def _rule(alert: Alert) -> dict[str, Any]:
    runbook = f"docs/operations.md#{alert.name.lower()}"
    return {
        "alert": alert.name,
        "expr": alert.condition,
        "for": alert.hold,
        "labels": {"severity": "warning"},
        "annotations": {"summary": f"Run {{{{ $labels.run }}}} {alert.summary}", "runbook": runbook},
    }


def text() -> str:
    """The rules as a file."""
    return yaml.safe_dump(rules(), sort_keys=False, width=120)


if __name__ == "__main__":
    print(text(), end="")
