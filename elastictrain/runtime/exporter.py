"""A run's live metrics in Prometheus, through the endpoint that Ray has on every node.

Runs in the tracker's process, off the training path, from the run's `status.json` and its journal alone: no rank sends
anything for it. What is gone, such as a rank after a shrink, is set to NaN once, since Ray repeats the last value of a
gauge for ever. What it holds of the events does not grow with the run's steps.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ray.util.metrics import Gauge

from elastictrain.status import Status
from elastictrain.tracking.journal import Position, follow, history
from elastictrain.tracking.metrics import METRICS, Latest, readings
from elastictrain.tracking.running_ledger import RunningLedger

Series = tuple[str, tuple[tuple[str, str], ...]]
"""A metric's name, and its labels."""
SetGauge = Callable[[str, float, dict[str, str]], None]
"""Of a metric's name, its value and its labels."""


def ray_gauges() -> SetGauge:
    """All metrics at the Prometheus endpoint of this node."""
    gauges = {metric.name: Gauge(metric.name, metric.meaning, ("run", *metric.labels)) for metric in METRICS}
    return lambda name, value, labels: gauges[name].set(value, labels)


class Exporter:
    """Of one run; `export` is called every few seconds."""

    def __init__(self, folder: Path, run: str, set_gauge: SetGauge) -> None:
        self._folder, self._run, self._set_gauge = folder, run, set_gauge
        self._set: dict[Series, float] = {}
        self._position = Position()
        self._latest = Latest()
        self._ledger = RunningLedger(partial(history, folder))

    def export(self) -> None:
        """Set all metrics to what they are now; nothing before the run has a state. Raises DataError of the journal."""
        try:
            status = Status.from_json(json.loads((self._folder / "status.json").read_bytes()))
        except (FileNotFoundError, ValueError):  # not there yet: the driver replaces it whole
            return
        for event, position in follow(self._folder, self._position):
            self._latest.add(event)
            self._ledger.add(event)
            self._position = position
        found: dict[Series, float] = {}
        for reading in readings(status, self._latest, self._ledger.goodput(None if status.ended else time.time())):
            found[reading.metric.name, (("run", self._run), *reading.labels.items())] = reading.value
        for name, labels in self._set.keys() - found.keys():
            self._set_gauge(name, math.nan, dict(labels))
        for (name, labels), value in found.items():
            self._set_gauge(name, value, dict(labels))
        self._set = found
