"""A run's live metrics in Prometheus, through the endpoint that Ray has on every node.

Runs in the tracker's process, off the training path, from the run's `status.json` and its journal alone: no rank sends
anything for it. What is gone, such as a rank after a shrink, is set to NaN once, since Ray repeats the last value of a
gauge for ever. The ledger costs a second for 100,000 steps; it is folded so seldom that it takes 2 % of a core.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

from ray.util.metrics import Gauge

from elastictrain.events import Event
from elastictrain.status import Status
from elastictrain.tracking.ledger import Goodput, goodput
from elastictrain.tracking.metrics import METRICS, readings

LEDGER_SHARE = 0.02


Series = tuple[str, tuple[tuple[str, str], ...]]
"""A metric's name, and its labels."""
SetGauge = Callable[[str, float, dict[str, str]], None]
"""Of a metric's name, its value and its labels."""


def ray_gauges() -> SetGauge:
    """All metrics at the Prometheus endpoint of this node."""
    gauges = {metric.name: Gauge(metric.name, metric.meaning, ("run", *metric.labels)) for metric in METRICS}
    return lambda name, value, labels: gauges[name].set(value, labels)


class Exporter:
    """Of one run; `export` is called every few seconds. `told` gives the events so far."""

    def __init__(self, folder: Path, run: str, told: Callable[[], list[Event]], set_gauge: SetGauge) -> None:
        self._status, self._run, self._told = folder / "status.json", run, told
        self._set_gauge = set_gauge
        self._set: dict[Series, float] = {}
        self._ledger = Goodput({}, {})
        self._fold_at = 0.0

    def export(self) -> None:
        """Set all metrics to what they are now; nothing before the run has a state."""
        try:
            status = Status.from_json(json.loads(self._status.read_bytes()))
        except (FileNotFoundError, ValueError):  # not there yet: the driver replaces it whole
            return
        events = self._told()
        found: dict[Series, float] = {}
        for reading in readings(status, events, self._fold(events, None if status.ended else time.time())):
            found[reading.metric.name, (("run", self._run), *reading.labels.items())] = reading.value
        for name, labels in self._set.keys() - found.keys():
            self._set_gauge(name, math.nan, dict(labels))
        for (name, labels), value in found.items():
            self._set_gauge(name, value, dict(labels))
        self._set = found

    def _fold(self, events: list[Event], now: float | None) -> Goodput:
        begun = time.monotonic()
        if begun >= self._fold_at:
            self._ledger = goodput(events, now)
            done = time.monotonic()
            self._fold_at = done + (done - begun) / LEDGER_SHARE
        return self._ledger
