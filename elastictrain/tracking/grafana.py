"""A Grafana dashboard made from the metrics (pure): `python -m elastictrain.tracking.grafana` prints it.

clusters/grafana/elastictrain.json is what it prints; a test holds the two together. The run is chosen at the top, and
the data source is whatever Prometheus scrapes Ray.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from elastictrain.tracking import metrics as m
from elastictrain.tracking.metrics import Metric

RAY_PREFIX = "ray_"
"""Ray puts it before every metric of an application."""

_UNITS = {"": "short", "s": "s", "tokens/s": "short", "ratio": "percentunit", "bytes": "decbytes"}
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot: a line for each metric and value of its labels."""

    title: str
    metrics: tuple[Metric, ...]
    stacked: bool = False
    rate: bool = False
    """Seconds a second, of what only grows."""


PANELS = (
    Panel("Step", (m.STEP, m.CHECKPOINT)),
    Panel("Loss", (m.LOSS,)),
    Panel("Tokens a second", (m.SPEED,)),
    Panel("Goodput", (m.GOODPUT,)),
    Panel("Where the time goes", (m.BUCKET_S,), stacked=True, rate=True),
    Panel("Where the workers' time goes", (m.WORKER_S,), stacked=True, rate=True),
    Panel("Workers, spares, nodes", (m.WORKERS, m.STANDBYS, m.NODES)),
    Panel("Seconds of a step", (m.STEP_S, m.WAIT_S)),
    Panel("Own work of each rank", (m.RANK_S,)),
    Panel("Step of each rank", (m.RANK_STEP,)),
    Panel("Memory of each rank, and the plan's", (m.RANK_BYTES, m.PLAN_BYTES)),
    Panel("Failures and lost steps", (m.FAILURES, m.LOST_STEPS, m.GENERATION)),
    Panel("What the model tells", (m.GAUGE,)),
    Panel("What it costs", (m.COST,)),
    Panel("Recovery and checkpoint writing", (m.RECOVERY_S, m.CHECKPOINT_S)),
)
WIDTH, HEIGHT = 12, 8
"""Of a panel; a row is 24 wide."""


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    return {
        "uid": "elastictrain",
        "title": "elastictrain",
        "tags": ["elastictrain"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_data_source(), _runs()]},
        "panels": [_panel(number, panel) for number, panel in enumerate(PANELS)],
    }


def query(metric: Metric, *, rate: bool = False) -> str:
    """PromQL for the chosen run. Ray adds labels of the exporting process, which a restart changes: they go."""
    by = ", ".join(("run", *metric.labels))
    series = f'{RAY_PREFIX}{metric.name}{{run=~"$run"}}'
    return f"sum by ({by}) (rate({series}[1m]))" if rate else f"max by ({by}) ({series})"


def _data_source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _runs() -> dict[str, Any]:
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": _SOURCE,
        "query": f"label_values({RAY_PREFIX}{m.STEP.name}, run)",
        "refresh": 2,
        "multi": True,
        "includeAll": True,
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    stacking = {"mode": "normal" if panel.stacked else "none"}
    unit = _UNITS[panel.metrics[0].unit] if not panel.rate else "percentunit"
    return {
        "id": number + 1,
        "title": panel.title,
        "description": "\n".join(f"{metric.name}: {metric.meaning}." for metric in panel.metrics),
        "type": "timeseries",
        "datasource": _SOURCE,
        "gridPos": {"x": WIDTH * (number % 2), "y": HEIGHT * (number // 2), "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {
            "defaults": {
                "unit": unit,
                "custom": {"fillOpacity": 60 if panel.stacked else 0, "stacking": stacking},
            },
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": _SOURCE,
                "expr": query(metric, rate=panel.rate),
                "legendFormat": _legend(metric, alone=len(panel.metrics) == 1),
            }
            for place, metric in enumerate(panel.metrics)
        ],
    }


def _legend(metric: Metric, *, alone: bool) -> str:
    labels = " ".join(f"{{{{{label}}}}}" for label in ("run", *metric.labels))
    return labels if alone else f"{labels} {metric.name.removeprefix('elastictrain_').replace('_', ' ')}"


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2))
