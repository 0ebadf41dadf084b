"""One attempt at a run: its journal, its live state, and its one end, told whatever happens.

An attempt that never had a cluster never was: it is forgotten, unless somebody stopped it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from elastictrain.config import TrainConfig
from elastictrain.control.vocabulary import End
from elastictrain.engine.schedule import learning_rate
from elastictrain.events import Event, RunEnded, RunStarted, StepCommitted, Warned
from elastictrain.progress import ProgressListener
from elastictrain.runtime.cluster import head_answers
from elastictrain.runtime.environment import environment
from elastictrain.runtime.home import RunHome
from elastictrain.runtime.live import Live
from elastictrain.runtime.stopping import Stop
from elastictrain.runtime.tracker import TrackingWatch
from elastictrain.status import Status
from elastictrain.tracking.deliver import Delivery, is_delivered
from elastictrain.tracking.html import render_html
from elastictrain.tracking.journal import Journal, JournalReader, next_attempt
from elastictrain.tracking.ledger import PRODUCTIVE
from elastictrain.tracking.redact import redact, redact_event, secret_values
from elastictrain.tracking.report import build_report

REPORT = "report.html"
"""In the run's folder."""
FLUSH_TIMEOUT_S = 20.0
HEADLESS_FLUSH_S = 3.0
_TOO_LATE = "planned fault {} ({} at step {}) will not strike: train.steps is {}"


_UNWRITTEN = (
    "{}. Training goes on, and what it tells is written when there is room. Until then `elastictrain status` shows an "
    "older moment, and after a crash the run would go on from an older one"
)
_WRITTEN = "the journal is whole again"
_OTHER_RATES = (
    "train.steps was {} and is now {}, so the learning rate follows another cosine: it is {:.3g} in step {}, where it "
    "would have been {:.3g}"
)


class Attempt:
    """Under the run's lock, from before its first event to after its report. Call `close` at the end, always."""

    def __init__(
        self, config: TrainConfig, home: RunHome, told: JournalReader, listener: ProgressListener | None, stop: Stop
    ) -> None:
        """Touch nothing yet. `told` reads the run's journal; `listener` hears each event and each status."""
        self.number = next_attempt(home.folder)
        self._config, self._home, self._told, self._listener, self._stop = config, home, told, listener, stop
        self._secret = secret_values(os.environ, config.run.storage, config.tracking.uri)
        self._status_before = home.status()
        self._journal: Journal | None = None
        self._has_cluster = False
        self._ended: End | None = None
        self.watch = TrackingWatch(self.emit)
        self._other_rates = other_rates(told.events(), config)
        self._journal_waits = False
        self.live = self._resumed_live()

    def begin(self) -> None:
        """Tell that the attempt begins. A stop that comes meanwhile comes when it has been told."""
        with self._stop.held():
            self._journal = Journal(self._home.folder, self.number)
            config = self._config
            self.emit(RunStarted(time.time(), config.run.name, self.number, config.to_dict(), environment()))
            self._publish()
            for number, fault in config.late_faults():
                late = _TOO_LATE.format(number, fault.kind, fault.at, config.train.steps)
                self.emit(Warned(time.time(), "faults", late))
            if self._other_rates:
                self.emit(Warned(time.time(), "resume", self._other_rates))

    def joined(self, cluster: str) -> None:
        """Tell that there is a cluster, in words: from now on the attempt is remembered."""
        self._has_cluster = True
        self.live.message = f"cluster {cluster}"
        self._publish()

    def emit(self, event: Event) -> None:
        """Journal the event, without the secrets in it, and show it."""
        assert self._journal is not None, "an attempt that has not begun tells nothing"
        event = redact_event(event, self._secret)
        with self._stop.held():  # a line is written once and whole
            self._journal.append(event)
            if self._has_cluster:
                self._home.mirror(self._journal)
            if self._listener is not None:
                self._listener.on_event(event)
        if bool(self._journal.problem) != self._journal_waits:
            self._journal_waits = not self._journal_waits
            told = _UNWRITTEN.format(self._journal.problem) if self._journal_waits else _WRITTEN
            self.emit(Warned(time.time(), "journal", told))

    def end(self, end: End) -> None:
        """Tell how it ended; of several ends the first counts, and one that comes before the beginning does not."""
        if self._ended or self._journal is None:
            return
        with self._stop.held():
            self._ended = end
            cause = None if end.status == "complete" else end.cause
            ended = RunEnded(time.time(), end.status, self.live.step, cause)
            self.live.fold(ended)
            self.emit(ended)
            self._publish()

    def flush(self, tracker: Any) -> str | None:
        """Deliver what is left to MLflow, and return its run id; what can't be is delivered with the next attempt."""
        self.watch.tracker = None
        timeout_s = FLUSH_TIMEOUT_S if head_answers() else HEADLESS_FLUSH_S
        while True:
            try:
                delivery, run_id = ray.get(tracker.flush.remote(timeout_s), timeout=2 * timeout_s)
            except RayError as error:
                delivery, run_id = Delivery(done=False, problem=str(error).splitlines()[0]), ""
            if not (self.watch.hear(delivery, over=True) and delivery.done):  # the news of it is delivered too
                return run_id or None

    def events(self) -> Sequence[Event]:
        """All that was told of the run until now, also what a full disk has refused."""
        unwritten = self._journal.unwritten if self._journal else []
        return [*self._told.events(), *unwritten] if unwritten else self._told.events()

    def close(self) -> None:
        """Write the report and close the journal; or, where nothing has begun, leave all as it was before."""
        if self._journal and (self._has_cluster or (self._ended and self._ended.status == "stopped")):
            write_report(self._home, self.events(), self.emit)
            self._home.mirror(self._journal, force=True)
            self._journal.close()
            return
        if self._journal:
            self._journal.close()
        self._home.forget(self._journal.path if self._journal else None, self._status_before)

    def _publish(self) -> None:
        self.live.publish(None, None, {}, force=True)

    def _show(self, status: Status) -> None:
        status = replace(status, message=redact(status.message, self._secret))
        self._home.write_status(status)
        self.watch.look()
        if self._listener is not None:
            self._listener.on_status(status)

    def _resumed_live(self) -> Live:
        earlier = self._told.events()
        began = next((e.at for e in earlier if isinstance(e, RunStarted)), time.time())
        live = Live(self._config, self.number, steps_done(earlier), began, self._show)
        if earlier:
            report = build_report(earlier)
            live.resume(sum(report["goodput"][bucket] for bucket in PRODUCTIVE), report["lost_steps"])
        return live


def steps_done(events: Sequence[Event]) -> int:
    """The last step that these events tell of; 0 before the first."""
    return max((e.step for e in events if isinstance(e, StepCommitted)), default=0)


def other_rates(earlier: Sequence[Event], config: TrainConfig) -> str:
    """What another train.steps changes about the steps that a run has still before it; empty for nothing."""
    begun = next((e for e in reversed(earlier) if isinstance(e, RunStarted)), None)
    step = steps_done(earlier) + 1
    if begun is None or step == 1:
        return ""
    steps = begun.config["train"]["steps"]
    before = learning_rate(config.train.model_copy(update={"steps": steps}), step)
    now = learning_rate(config.train, step)
    return "" if now == before else _OTHER_RATES.format(steps, config.train.steps, now, step, before)


def write_report(home: RunHome, events: Sequence[Event], emit: Callable[[Event], None]) -> None:
    """Write the run's report into its folder. Where there is no room for it, a warning says so."""
    path = home.folder / REPORT
    try:
        path.write_text(render_html(build_report(events, delivered=is_delivered(home.folder))), encoding="utf-8")
    except OSError as error:
        message = f"can't write {path}: {error.strerror}. `elastictrain report --html` writes it elsewhere."
        emit(Warned(time.time(), "report", message))
