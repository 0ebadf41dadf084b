"""Delivery of a journal to MLflow, off the training path: what the store missed is delivered later.

The position in the journal is kept in `<run folder>/mlflow.json`, replaced atomically after each delivered batch. A
process killed between a batch and its position delivers that batch again, which changes nothing. A process that begins
reads what was delivered before, some 20 us an event, and writes only what was not. It holds no events: when an attempt
ends, its report is folded from the journal.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from elastictrain.errors import DataError
from elastictrain.events import Event, RunStarted, StepCommitted, encode
from elastictrain.tracking.event_log import EventLog
from elastictrain.tracking.exact_json import dumps
from elastictrain.tracking.html import render_html
from elastictrain.tracking.journal import Position, history, tail
from elastictrain.tracking.lineage import Batch, Lineage
from elastictrain.tracking.mlflow_record import CheckpointRecord, MlflowRecord, TrackingUnavailableError
from elastictrain.tracking.model_card import model_card
from elastictrain.tracking.redact import redact_all
from elastictrain.tracking.report import build_report

EVENTS_PER_BATCH = 500


@dataclass(frozen=True, slots=True)
class Delivery:
    """How far a delivery came."""

    done: bool
    """Everything that is in the journal is in the store."""
    problem: str = ""
    """Why the store could not take it; empty when only the time ran out."""


class Deliverer:
    """Delivers one run's journal. One thread uses it; nothing is imported or connected before the first call."""

    def __init__(self, run_folder: Path, uri: str, experiment: str, run_name: str, parent: str | None = None) -> None:
        """`parent` is the id of the MLflow run that this one is nested under."""
        self._folder = run_folder
        self._uri = uri
        self._parent = parent
        self._experiment = experiment
        self._run_name = run_name
        self._record: MlflowRecord | None = None
        self._position = Position()
        self._lineage = self._new_lineage()
        self._unwritten: tuple[Batch, Position] | None = None

    @property
    def run_id(self) -> str:
        """Of the MLflow run; empty before the first delivery that reached the store."""
        return self._record.run_id if self._record else _saved(self._folder)[0]

    def is_done(self) -> bool:
        """Whether everything in the journal was delivered; asks no store."""
        return is_delivered(self._folder)

    def deliver(self, timeout_s: float) -> Delivery:
        """Deliver what is new, beginning no batch after timeout_s; never raises for a problem of the store.

        A dead server costs about 2 s, a locked SQLite file 1 s, a batch of 500 steps about 1 s.
        """
        deadline = time.monotonic() + timeout_s
        try:
            record = self._record or self._open()
            while record is not None and self._next_batch():
                if time.monotonic() > deadline:
                    return Delivery(done=False)
                self._write(record)
        except (TrackingUnavailableError, DataError, OSError) as error:
            self._record = None
            return Delivery(done=False, problem=str(error))
        return Delivery(done=True)

    def checkpoints(self) -> list[CheckpointRecord]:
        """What the MLflow run lists, newest step first; `deliver` first, so that it lists what the journal knows.

        Raises TrackingUnavailableError when the store can't be asked.
        """
        record = self._record or self._open()
        return record.checkpoints() if record else []

    def _open(self) -> MlflowRecord | None:
        """Connect, and find the run; None while the journal is empty."""
        first, _ = tail(self._folder, Position(), limit=1)
        if not first:
            return None
        record = MlflowRecord(self._uri, self._experiment)
        run_id, position = _saved(self._folder)
        if not run_id or not record.find_run(run_id):
            assert isinstance(first[0], RunStarted)
            record.find_or_create_run(self._run_name, first[0].at, self._parent)
            position = Position()
        self._take_up(position)
        self._record = record
        self._save(position)
        return record

    def _take_up(self, position: Position) -> None:
        """Fold what was delivered before, so that what follows is told as if by one process."""
        self._lineage, self._unwritten, self._position = self._new_lineage(), None, position
        delivered = history(self._folder, until=position)
        while batch := [*islice(delivered, EVENTS_PER_BATCH)]:
            self._lineage.add(batch)

    def _new_lineage(self) -> Lineage:
        return Lineage(partial(history, self._folder))

    def _next_batch(self) -> bool:
        """Whether there is something to write."""
        if self._unwritten is None:
            events, position = tail(self._folder, self._position, EVENTS_PER_BATCH)
            if events:
                self._unwritten = self._lineage.add(events), position
        return self._unwritten is not None

    def _write(self, record: MlflowRecord) -> None:
        assert self._unwritten is not None
        batch, position = self._unwritten
        record.write(batch)
        record.write_files({f"config/attempt-{n:04d}.yaml": yaml.safe_dump(c) for n, c in batch.configs.items()})
        if batch.ended_at_ms is not None:
            events = EventLog(history(self._folder, until=position))
            report = build_report(events, delivered=True)
            record.write_files(_files(report, events))
            if batch.finished is not None:
                of_text = report["config"]["data"].get("samples") is None and report["data"] is not None
                text_model = {key: report[key] for key in ("config", "data")} if of_text else None
                record.publish(batch.finished, model_card(report, batch.finished.uri), text_model)
        self._save(position)
        self._unwritten, self._position = None, position

    def _save(self, position: Position) -> None:
        assert self._record is not None
        state = {"run_id": self._record.run_id, "attempt": position.attempt, "offset": position.offset}
        new = self._folder / f"mlflow.json.{os.getpid()}"
        new.write_text(json.dumps(state), encoding="utf-8")
        new.replace(self._folder / "mlflow.json")


def is_delivered(run_folder: Path) -> bool:
    """Whether everything in the journal is in the store; asks no store."""
    run_id, position = _saved(run_folder)
    return bool(run_id) and not tail(run_folder, position, limit=1)[0]


def _saved(run_folder: Path) -> tuple[str, Position]:
    """The run and position of an earlier delivery; the beginning where there is none that can be read."""
    try:
        saved = json.loads((run_folder / "mlflow.json").read_bytes())
        run_id, attempt, offset = saved["run_id"], saved["attempt"], saved["offset"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return "", Position()
    if type(run_id) is not str or type(attempt) is not int or type(offset) is not int or min(attempt, offset) < 0:
        return "", Position()
    return run_id, Position(attempt, offset)


def _files(report: dict[str, Any], events: Iterable[Event]) -> dict[str, str]:
    """What the run keeps as artifacts when an attempt ends."""
    told = [redact_all(encode(e)) for e in events if not isinstance(e, StepCommitted)]
    return {
        "report.html": render_html(report),
        "report.json": dumps(report, indent=1),
        "events.json": dumps(told, indent=1),
    }
