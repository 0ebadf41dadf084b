"""The run's record in an MLflow store: one MLflow run for all attempts, one logged model for each checkpoint.

mlflow is imported only when a record is opened: 1.2 to 3 s, and 1.5 to 4 s more to set up a new SQLite store. Every
call raises TrackingUnavailableError when the store is down, locked or refuses, within seconds. Everything is written
so that writing it twice leaves what writing it once leaves.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from elastictrain.errors import InfrastructureError
from elastictrain.tracking import sqlite_store
from elastictrain.tracking.lineage import Batch, CheckpointTags, Finished
from elastictrain.tracking.mlflow_registry import register
from elastictrain.tracking.redact import redact
from elastictrain.uncollected import uncollected
from elastictrain.untracked import refuse_telemetry

T = TypeVar("T")

MAX_METRICS_PER_CALL = 1000
MAX_PARAMS_PER_CALL = 100

_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Set where the user has not: a dead server costs seconds, and MLflow is quiet."""


class TrackingUnavailableError(InfrastructureError):
    """The MLflow store is down, locked, or refuses what it was given."""


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """A durable checkpoint, as the MLflow run lists it."""

    step: int
    uri: str
    """Without user name and password, where the storage's URI has them."""
    sha256: str
    num_bytes: int
    samples: int
    """The cursor: samples consumed."""
    loss: float
    layout: dict[str, Any]
    removed: bool
    parent: str
    """URI of the checkpoint that its state went through before; "" for none, or where an older version wrote it."""
    best: bool
    last: bool


class MlflowRecord:
    """One MLflow run, written by one process."""

    def __init__(self, uri: str, experiment: str) -> None:
        """Connect, setting up an SQLite store and creating the experiment where they do not exist."""
        self._uri = uri
        refuse_telemetry()
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with self._errors():
            with uncollected():
                from mlflow.tracking import MlflowClient

            for name in ("mlflow", "alembic"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
            self._database = sqlite_store.file_of(uri)
            if self._database and not self._database.exists():
                sqlite_store.set_up(self._database)
            self._probe()
            self._client = MlflowClient(uri)
            self.experiment_id = self._experiment(experiment)
        self.run_id = ""
        self._models: dict[str, str] = {}

    def find_run(self, run_id: str) -> bool:
        """Take up the run with this id; False when the store has it no more."""
        from mlflow.exceptions import MlflowException

        with self._errors():
            try:
                run = self._client.get_run(run_id)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return False
                raise
            if run.info.lifecycle_stage != "active":
                return False
            self._take(run)
        return True

    def find_or_create_run(self, run_name: str, started_at: float, parent: str | None = None) -> None:
        """Take up the run of this name that began at this time, or create it, under the run with id `parent`."""
        tags = {"elastictrain.run": run_name, "elastictrain.started_at": repr(started_at)}
        condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        with self._errors():
            runs = self._client.search_runs([self.experiment_id], condition, max_results=1)
            tags |= {"mlflow.parentRunId": parent} if parent else {}
            self._take(
                runs[0]
                if runs
                else self._client.create_run(self.experiment_id, int(started_at * 1000), tags, run_name=run_name)
            )

    def write(self, batch: Batch) -> None:
        """Add the batch to the run."""
        from mlflow.entities import Metric, RunTag

        with self._errors():
            self._probe()
            for config in batch.params:
                self._write_config(config)
            for metrics in _batched(batch.metrics, MAX_METRICS_PER_CALL):
                self._client.log_batch(self.run_id, metrics=[Metric(*point) for point in metrics])
            for tags in _batched(batch.tags.items(), MAX_PARAMS_PER_CALL):
                self._client.log_batch(self.run_id, tags=[RunTag(*tag) for tag in tags])
            for checkpoint in batch.checkpoints.values():
                self._write_checkpoint(checkpoint)
            if batch.ended_at_ms is not None:
                self._client.set_terminated(self.run_id, batch.status, batch.ended_at_ms)
            elif batch.status:
                self._client.update_run(self.run_id, status=batch.status)

    def write_files(self, files: dict[str, str]) -> None:
        """Store texts as the run's artifacts, by file name."""
        with self._errors():
            for name, text in files.items():
                try:
                    self._client.log_text(self.run_id, text, name)
                except Exception as error:  # each cloud's client has exceptions of its own
                    raise TrackingUnavailableError(
                        f"MLflow can't store the artifact {name}: {_one_line(error)}"
                    ) from error

    def publish(self, finished: Finished, card: str, text_model: Mapping[str, Any] | None) -> None:
        """Make the finished model's checkpoint a version of the registered model that has the run's name.

        `text_model` is what MLflow needs to load a model of language; what another one takes nobody knows.
        """
        with self._errors():
            model = self._client.get_logged_model(self._models[finished.uri])
            try:
                served = self._database is None
                register(self._client, finished.run, self.run_id, model, card, text_model, served=served)
            except OSError as error:
                raise TrackingUnavailableError(f"MLflow can't store the model's card: {_one_line(error)}") from error

    def checkpoints(self) -> list[CheckpointRecord]:
        """The run's checkpoints, newest step first, removed ones among them."""
        with self._errors():
            self._probe()
            return sorted(map(_checkpoint, self._logged_models()), key=lambda record: -record.step)

    def _take(self, run: Any) -> None:
        self.run_id = run.info.run_id
        self.experiment_id = run.info.experiment_id
        self._models = {model.tags["elastictrain.uri"]: model.model_id for model in self._logged_models()}

    def _write_config(self, config: dict[str, str]) -> None:
        """Params can't change in MLflow: what a later attempt changed goes into tags."""
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self.run_id).data.params
        for params in _batched(((k, v) for k, v in config.items() if k not in known), MAX_PARAMS_PER_CALL):
            self._client.log_batch(self.run_id, params=[Param(*param) for param in params])
        changed = ((f"config.{k}", v) for k, v in config.items() if known.get(k, v) != v)
        for tags in _batched(changed, MAX_PARAMS_PER_CALL):
            self._client.log_batch(self.run_id, tags=[RunTag(*tag) for tag in tags])

    def _write_checkpoint(self, checkpoint: CheckpointTags) -> None:
        model_id = self._models.get(checkpoint.uri)
        if model_id:
            self._client.set_logged_model_tags(model_id, checkpoint.tags)
        else:
            name = f"step-{checkpoint.step:08d}"
            model = self._client.create_logged_model(
                self.experiment_id, name, self.run_id, checkpoint.tags, model_type="elastictrain checkpoint"
            )
            model_id = self._models[checkpoint.uri] = model.model_id
        self._client.finalize_logged_model(model_id, "READY")

    def _logged_models(self) -> Iterator[Any]:
        """Of this run and written by this project, page by page."""
        token = None
        while True:
            page = self._client.search_logged_models(
                [self.experiment_id], f"source_run_id = '{self.run_id}'", page_token=token
            )
            yield from (model for model in page if "elastictrain.uri" in model.tags)
            token = page.token
            if not token:
                return

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            beside = (self._database.parent / "mlartifacts").as_uri() if self._database else None
            experiment_id: str = self._client.create_experiment(name, beside)
            return experiment_id
        return str(found.experiment_id)

    def _probe(self) -> None:
        if self._database:
            sqlite_store.probe(self._database)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        import requests
        import sqlalchemy
        from alembic.util import CommandError
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (
            MlflowException,
            requests.RequestException,
            sqlalchemy.exc.SQLAlchemyError,
            sqlite3.Error,
            CommandError,
            ImportError,
            OSError,
        ) as error:
            chain = list(_chain(error))
            plain = chain[-1] if any(isinstance(e, requests.RequestException) for e in chain) else error
            where = f"MLflow at {redact(self._uri)} takes nothing"
            raise TrackingUnavailableError(f"{where}: {_one_line(plain)}") from error


def _checkpoint(model: Any) -> CheckpointRecord:
    tags = {key.removeprefix("elastictrain."): value for key, value in model.tags.items()}
    return CheckpointRecord(
        step=int(tags["step"]),
        uri=tags["uri"],
        sha256=tags["sha256"],
        num_bytes=int(tags["bytes"]),
        samples=int(tags["samples"]),
        loss=float(tags["loss"]),
        layout=json.loads(tags["layout"]),
        removed=tags["removed"] == "true",
        parent=tags.get("parent", ""),
        best=tags.get("best") == "true",
        last=tags.get("last") == "true",
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it. The last one of a failed request says plainly why: 'Connection refused'."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _one_line(error: BaseException) -> str:
    told = (isinstance(error, OSError) and error.strerror) or str(error)
    text = " ".join(redact(told).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:399] + "…"


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
