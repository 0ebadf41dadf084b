"""What is known of a sweep: its trials, their values and what they came to. It is resumed from this, and from its runs.

One JSON file, `_sweeps/<name>/sweep.json` in the storage, replaced whole: a few hundred bytes a trial and 20 a report.
Ray Tune's own state is pickled, lives in a passing folder of the driver's machine, and is never read again: a trial
that is under way goes on as a run by its name, one that has ended is not run again, and what it came to is told anew
to the searcher.
"""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from elastictrain.config import TrainConfig, blocking_changes
from elastictrain.errors import DataError, RunConflictError
from elastictrain.runtime.home import local_root
from elastictrain.storage import Storage
from elastictrain.sweep.space import Sweep
from elastictrain.tracking.redact import redact_all

FOLDER = "_sweeps"
"""In the storage: no run's name begins with an underscore."""
_FILE = "sweep.json"

TrialState = Literal["waiting", "running", "complete", "stopped", "failed"]
"""Not begun, under way (or cut off), trained to its end, stopped by the scheduler, given up after an error."""
FINAL: frozenset[TrialState] = frozenset({"complete", "stopped", "failed"})


@dataclass
class Leg:
    """A run of a trial. One with scheduler pbt has several: each begins from a checkpoint of another trial."""

    run: str
    values: dict[str, Any]
    start_from: str | None = None
    """That checkpoint, RUN@STEP."""


@dataclass
class Trial:
    """One trial."""

    number: int
    values: dict[str, Any]
    """The newest."""
    state: TrialState = "waiting"
    legs: list[Leg] = field(default_factory=list)
    points: list[tuple[int, float]] = field(default_factory=list)
    """Step and metric of each report."""
    step: int = 0
    """The last that was reported."""
    workers: int = 0
    message: str = ""
    """Why it failed."""

    @property
    def score(self) -> float | None:
        """The metric at the last report."""
        return self.points[-1][1] if self.points else None

    def take(self, report: Mapping[str, Any], metric: str) -> None:
        """Add a report of the trial."""
        leg = Leg(report["run"], dict(report["values"]), report["start_from"])
        if leg.run not in {known.run for known in self.legs}:
            self.legs.append(leg)
        self.values, self.step, self.workers = leg.values, report["step"], report["workers"]
        self.state, self.message = report["state"], report["message"]
        score = report.get(metric)
        if score is not None and math.isfinite(score):
            self.points.append((self.step, score))


class SweepRecord:
    """The record of one sweep; whoever has it `locked` is the only one that writes it."""

    def __init__(self, sweep: Sweep, config: TrainConfig) -> None:
        """Read what is there; raises RunConflictError where it is of another sweep, DataError where it is damaged."""
        self.sweep, self._config = sweep, config
        storage = Storage.open(config.run.storage)
        storage.check_writable()
        self.storage = storage.run(f"{FOLDER}/{sweep.name}")
        self.folder = local_root(storage) / FOLDER / sweep.name
        """On this machine."""
        self.trials: dict[int, Trial] = {}
        self.started_at = 0.0
        if self.storage.exists(_FILE):
            self._read()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the sweep until the block or the process ends; raises RunConflictError when another process has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunConflictError(
                    f"sweep {self.sweep.name!r} is being run now by another process ({self.folder}). Wait for it, stop "
                    "it, or give the space file another name."
                ) from None
            yield

    def add(self, number: int, values: Mapping[str, Any]) -> Trial:
        """The trial of this number, which gets these values where it is new."""
        return self.trials.setdefault(number, Trial(number, dict(values)))

    def unfinished(self) -> list[Trial]:
        """Trials that have been given values and have not ended."""
        return [trial for trial in self.trials.values() if trial.state not in FINAL]

    @property
    def is_over(self) -> bool:
        """Whether every trial that is wanted has ended."""
        sweep = self.sweep
        wanted = len(list(sweep.grid())) if sweep.search == "grid" else sweep.trials or 0
        return len(self.trials) >= wanted and not self.unfinished()

    def told(self) -> dict[str, Any]:
        """What a picture of it needs."""
        sweep = self.sweep
        return {
            "sweep": sweep.name,
            "metric": sweep.metric,
            "trials": [
                {"name": f"{sweep.name}-{t.number}", "values": t.values, "state": t.state, "points": t.points}
                for t in self.ranked()
            ],
        }

    def ranked(self) -> list[Trial]:
        """Best first; those without a score last."""
        sign = 1 if self.sweep.mode == "min" else -1
        return sorted(self.trials.values(), key=lambda t: (t.score is None, sign * (t.score or 0), t.number))

    def write(self) -> None:
        """Put it into the storage."""
        data = {
            "sweep": self.sweep.model_dump(mode="json", exclude_unset=True),
            "config": redact_all(self._config.to_dict()),
            "started_at": self.started_at,
            "trials": [asdict(trial) for _, trial in sorted(self.trials.items())],
        }
        self.storage.write_atomic(_FILE, json.dumps(data, indent=1).encode())

    def _read(self) -> None:
        where = f"{self.storage.uri}/{_FILE}"
        try:
            data = json.loads(self.storage.read(_FILE))
            old = Sweep.model_validate(data["sweep"])
            config = TrainConfig.from_dict(data["config"], where)
            trials = _schema().validate_python(data["trials"])
            self.started_at = float(data["started_at"])
        except (ValidationError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{where} is damaged: {error}. Remove it to begin the sweep anew.") from None
        told = TrainConfig.from_dict(redact_all(self._config.to_dict()))
        changes = [(f"space file: {key}", a, b) for key, a, b in _changes(old, self.sweep)]
        changes += blocking_changes(config, told)
        if changes:
            words = "; ".join(f"{key} was {a!r} and is now {b!r}" for key, a, b in changes)
            raise RunConflictError(
                f"sweep {self.sweep.name!r} in {self.storage.uri} can't go on with this: {words}. Put the old value "
                "back, or give the space file another name to begin a new sweep."
            )
        for trial in trials:
            self.sweep.check_values(trial.values, f"{where}: trial {trial.number}")
        self.trials = {trial.number: trial for trial in trials}


def _changes(old: Sweep, new: Sweep) -> list[tuple[str, Any, Any]]:
    """Fields that forbid going on: all but how many trials and workers there are."""
    before, after = old.model_dump(), new.model_dump()
    return [(k, before[k], after[k]) for k in before if k not in _FREE and before[k] != after[k]]


_FREE = ("trials", "workers", "concurrent")


@cache
def _schema() -> TypeAdapter[list[Trial]]:
    return TypeAdapter(list[Trial])
