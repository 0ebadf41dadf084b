"""The tracker: the one process that writes to MLflow, off the training path, from the journal alone.

It also exports the run's live metrics to Prometheus (`exporter`), whether MLflow can be reached or not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastictrain.config import TrainConfig
from elastictrain.errors import DataError
from elastictrain.events import Event, Warned
from elastictrain.runtime.exporter import Exporter, ray_gauges
from elastictrain.runtime.home import RunHome
from elastictrain.tracking.deliver import Deliverer, Delivery
from elastictrain.tracking.mlflow_record import TrackingUnavailableError
from elastictrain.tracking.sqlite_store import default_uri
from elastictrain.tracking.wording import seconds_text

UNDELIVERED = (
    "{} (since {}). Training goes on; what is missing waits in the journal until the store answers, or the run is "
    "submitted again. tracking.uri can name another store."
)
DELIVERED = "MLflow answers again after {}, and has taken all that was missing"
EVERY_S = 5.0
_ROUND_S = 10.0


class Tracker:
    """Runs as a Ray actor on the driver's node, where the journal is."""

    def __init__(self, folder: str, uri: str, experiment: str, run: str, parent: str | None) -> None:
        self._deliverer = Deliverer(Path(folder), uri, experiment, run, parent)
        self._lock = threading.Lock()
        self._last = Delivery(done=False)
        self._exporter = Exporter(Path(folder), run, ray_gauges())
        for work in (self._deliver_for_ever, self._export_for_ever):
            threading.Thread(target=work, name=work.__name__.split("_")[1], daemon=True).start()

    def _deliver_for_ever(self) -> None:
        while True:
            self._deliver(_ROUND_S)
            time.sleep(EVERY_S)

    def _export_for_ever(self) -> None:
        while True:
            time.sleep(EVERY_S)
            with suppress(DataError):  # the delivery tells of a journal that is damaged
                self._exporter.export()

    def _deliver(self, timeout_s: float) -> Delivery:
        with self._lock:
            self._last = self._deliverer.deliver(timeout_s)
            return self._last

    def last(self) -> Delivery:
        """How the last delivery went."""
        return self._last

    def flush(self, timeout_s: float) -> tuple[Delivery, str]:
        """Deliver what is left: how that went, and the MLflow run id."""
        return self._deliver(timeout_s), self._deliverer.run_id

    def recorded(self) -> dict[int, str] | None:
        """SHA-256 of each checkpoint in the record, by step; None when the record can't be read."""
        with self._lock:
            if not self._deliverer.deliver(_ROUND_S).done:
                return None
            try:
                return {c.step: c.sha256 for c in self._deliverer.checkpoints() if not c.removed}
            except TrackingUnavailableError:
                return None


class TrackingWatch:
    """Tells once when MLflow takes nothing any more, and once when it has taken all of it after all.

    `look` is called often, and waits for nothing.
    """

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self.tracker: Any = None
        self._emit = emit
        self._asked_at = 0.0
        self._answer: Any = None
        self._since: float | None = None
        """When MLflow stopped taking anything; None while it does."""

    def look(self) -> None:
        """Ask the tracker how its last delivery went, or hear what it says."""
        if self.tracker is None:
            return
        if self._answer is None:
            if time.monotonic() > self._asked_at + 2.0:
                self._asked_at, self._answer = time.monotonic(), self.tracker.last.remote()
        elif ray.wait([self._answer], timeout=0)[0]:
            answer, self._answer = self._answer, None
            with suppress(RayError):
                self.hear(ray.get(answer))

    def hear(self, last: Delivery, over: bool = False) -> bool:
        """Whether this is news, which is told. `over`: no more deliveries follow, so that a slow one counts too."""
        now = time.time()
        if last.done and self._since is not None:
            gap, self._since = now - self._since, None
            self._emit(Warned(now, "tracking", DELIVERED.format(seconds_text(gap))))
            return True
        if self._since is None and (last.problem or (over and not last.done)):
            self._since = now
            clock = time.strftime("%H:%M:%S", time.localtime(now))
            self._emit(Warned(now, "tracking", UNDELIVERED.format(last.problem or "MLflow is slow", clock)))
            return True
        return False


def tracking_uri(config: TrainConfig, home: RunHome) -> str:
    """The MLflow store of this run."""
    return config.tracking.uri or default_uri(home.root)


def start_tracker(config: TrainConfig, home: RunHome, attempt: int) -> Any:
    """Start the tracker next to this process; Ray restarts it when it dies, and it goes on from its position."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=4)(Tracker)
    uri, tracking = tracking_uri(config, home), config.tracking
    return actor.options(
        name=f"{config.run.name}/tracker-{attempt}",
        scheduling_strategy=here,
    ).remote(str(home.folder), uri, tracking.experiment, config.run.name, tracking.parent)
