"""The sweep's own MLflow run, under which those of its trials are shown: what is searched, and what came of it.

A store that can't be reached costs the sweep nothing but this record: that is told, and the trials' runs stand alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict

from elastictrain.config import TrainConfig, flatten
from elastictrain.sweep.record import SweepRecord
from elastictrain.sweep.table import values_text
from elastictrain.tracking.lineage import Batch, cut
from elastictrain.tracking.mlflow_record import MlflowRecord, TrackingUnavailableError
from elastictrain.tracking.redact import redact_all
from elastictrain.tracking.sqlite_store import default_uri
from elastictrain.tracking.sweep_chart import sweep_chart


class ParentRun:
    """Opened when the sweep begins, written again when it ends."""

    def __init__(self, record: SweepRecord, config: TrainConfig, tell: Callable[[str], None]) -> None:
        self._record, self._tell = record, tell
        self._mlflow: MlflowRecord | None = None
        sweep = record.sweep
        try:
            root = record.folder.parents[1]
            mlflow = MlflowRecord(config.tracking.uri or default_uri(root), config.tracking.experiment)
            mlflow.find_or_create_run(sweep.name, record.started_at)
            told = {**sweep.model_dump(mode="json", exclude_none=True), "config": redact_all(config.to_dict())}
            params = {key: cut(str(value)) for key, value in flatten(told)}
            mlflow.write(Batch(params=[params], tags={"elastictrain.kind": "sweep"}, status="RUNNING"))
            self._mlflow = mlflow
        except TrackingUnavailableError as error:
            tell(f"the sweep has no MLflow run of its own: {error}")

    @property
    def run_id(self) -> str | None:
        """Of the MLflow run; None where there is none."""
        return self._mlflow.run_id if self._mlflow else None

    def end(self) -> None:
        """Write down what came of it."""
        if self._mlflow is None:
            return
        record = self._record
        best = next((trial for trial in record.ranked() if trial.score is not None), None)
        batch = Batch(status="FINISHED" if record.is_over else "KILLED", ended_at_ms=int(time.time() * 1000))
        if best is not None and best.score is not None:
            batch.tags |= {"elastictrain.best": best.legs[-1].run, "elastictrain.best_values": values_text(best.values)}
            batch.metrics.append((record.sweep.metric, best.score, int(time.time() * 1000), best.step))
        trials = [asdict(trial) for trial in record.ranked()]
        try:
            self._mlflow.write(batch)
            self._mlflow.write_files(
                {"sweep.json": json.dumps(trials, indent=1), "sweep.svg": sweep_chart(record.told())}
            )
        except TrackingUnavailableError as error:
            self._tell(f"the sweep's own MLflow run is not complete: {error}")
