"""One leg of a trial from outside: starts its process, follows the run's journal, reports, stops it.

Nothing is asked of the training process: what it did is in the journal, a step at a time. A leg that has a journal
already goes on where that ends; its values are those that it began with.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastictrain.checkpoint.of_run import checkpoints_of
from elastictrain.checkpoint.store import CheckpointStore
from elastictrain.config import TrainConfig
from elastictrain.errors import InfrastructureError
from elastictrain.events import CheckpointWritten, Evaluated, Event, GenerationStarted, StepCommitted
from elastictrain.runtime.home import RunHome, is_driven
from elastictrain.storage import Storage
from elastictrain.sweep.space import Sweep, config_of
from elastictrain.tracking.journal import Position, tail
from elastictrain.tracking.ledger import productive_s

LOOK_EVERY_S = 0.1
STOP_FILE = "stop"
"""In the sweep's passing folder: when it is there, the sweep stops."""
TRIAL = f"{__package__}.trial"
"""What such a process runs; not imported here, for it brings torch."""
STOPPED = 130
"""Its exit status when it was told to stop."""
ERROR = "error: "
"""How its last line begins when it ends with an error."""
END_TIMEOUT_S = 120.0
"""The last state of a run that is stopped is written first."""
RETRIED = frozenset({STOPPED, InfrastructureError.exit_code})
"""Exit statuses after which the same run may well go on; others are the fault of the trial's code or values."""


@dataclass(frozen=True)
class Orders:
    """What all trials of a sweep have in common, as their starters on the driver's node read it."""

    config: dict[str, Any]
    sweep: dict[str, Any]
    address: str
    """Of the cluster."""
    parent: str | None
    """Id of the sweep's MLflow run."""
    driver_pid: int
    folder: str
    """The user's working directory."""

    @classmethod
    def read(cls, scratch: Path) -> Orders:
        """From the sweep's passing folder."""
        return cls(**json.loads((scratch / "orders.json").read_bytes()))

    def write(self, scratch: Path) -> None:
        """To the sweep's passing folder."""
        (scratch / "orders.json").write_text(json.dumps(self.__dict__))


class LegRun:
    """The newest leg of a trial, begun or gone on with."""

    def __init__(
        self, scratch: Path, orders: Orders, name: str, values: dict[str, Any], start_from: str | None
    ) -> None:
        """`start_from`: another trial's checkpoint to begin a new leg from; None to go on, or begin afresh.

        Where that run has removed it meanwhile, its newest one serves.
        """
        self._sweep = Sweep.model_validate(orders.sweep)
        self._stop = scratch / STOP_FILE
        base = TrainConfig.from_dict(orders.config)
        legs = _legs(base, name)
        newest = _begun_with(base, legs[-1]) if legs else None
        self._held: tuple[CheckpointStore, int] | None = None
        asked, before = json.dumps([start_from, values]), scratch / f"{name}.asked"
        again = before.exists() and before.read_text() == asked  # Tune tries what failed again
        if newest is not None and (start_from is None or again):
            leg, start_from = legs[-1], newest.run.start_from
            values = {key: _value(newest, key) for key in self._sweep.space}
            self._sweep.check_values(values, f"{leg}/config.json")
        else:
            leg = name if not legs else f"{name}.{len(legs) + 1}"
            start_from = self._hold(base, start_from) if start_from else None
        self.values, self.start_from = values, start_from
        self._first_step = int(start_from.rpartition("@")[2]) if start_from else 0
        self.config = self._config(orders, base, leg)
        self.home = RunHome(self.config)
        self._every = self._sweep.steps_between_reports(self.config.train.steps)
        self._position, self._window = Position(), dict[int, StepCommitted]()
        self._evaluated: Evaluated | None = None
        self._written: CheckpointWritten | None = None
        self._workers = 0
        self._read()
        self._reported = self.step
        self._process = self._begin(scratch, orders, name)
        before.write_text(asked)

    def _config(self, orders: Orders, base: TrainConfig, leg: str) -> TrainConfig:
        data = config_of(base, self.values, self._sweep.name).to_dict()
        data["run"] |= {"name": leg, "start_from": self.start_from}
        data["cluster"] |= {"address": orders.address}
        data["elastic"] |= {"standby": 0}  # the budget's workers train
        data["tracking"] |= {"parent": orders.parent}
        if self._sweep.scheduler == "pbt":  # others begin from its checkpoints
            every = self._sweep.steps_of_grace(base.train.steps)
            data["checkpoint"] |= {"every": min(base.checkpoint.every, every)}
        return TrainConfig.from_dict(data, self._sweep.name)

    def _begin(self, scratch: Path, orders: Orders, name: str) -> subprocess.Popen[bytes]:
        deadline = time.monotonic() + END_TIMEOUT_S
        while is_driven(self.home.folder) and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY_S)  # an earlier process writes its last state
        leg = self.config.run.name
        order = scratch / f"{leg}.json"
        order.write_text(json.dumps({"config": self.config.to_dict(), "slots": str(scratch / f"{name}.slots")}))
        self._log = scratch / f"{leg}.log"
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", TRIAL, str(order)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(orders.driver_pid),
                cwd=orders.folder,
                start_new_session=True,
            )

    @property
    def step(self) -> int:
        """The last that is on record."""
        return max(self._window, default=self._first_step)

    def next_report(self) -> dict[str, Any]:
        """Wait until there is something to report.

        Raises InfrastructureError when the process is gone and the run should be tried again.
        """
        while True:
            code = self._process.poll()
            self._read()
            if self._written is not None or code is not None:
                self._let_go()
            if code is not None:
                return self._last_report(code)
            due = self.step // self._every * self._every
            if self._reported < due < self.config.train.steps:
                self._reported = due
                report = self._report(due, "running")
                self._window = {step: event for step, event in self._window.items() if step >= due}
                return report
            if self._stop.exists():
                return self._report(self.step, "running") | {"done": True, "cut_off": True}
            time.sleep(LOOK_EVERY_S)

    def newest_checkpoint(self) -> str | None:
        """The newest durable one, as run.start_from names it; waits for the first. None where there will be none."""
        deadline = time.monotonic() + END_TIMEOUT_S
        while self._written is None and self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY_S)
            self._read()
        return f"{self.config.run.name}@{self._written.step}" if self._written is not None else None

    def _hold(self, base: TrainConfig, start_from: str) -> str:
        """Keep the checkpoint, or the newest of its run, from being removed before the leg has a copy."""
        run, _, step = start_from.rpartition("@")
        store = checkpoints_of(base.model_copy(update={"run": base.run.model_copy(update={"name": run})}))
        for wanted in (int(step), *(found.step for found in store.list())):
            if store.pin(wanted):
                self._held = store, wanted
                return f"{run}@{wanted}"
        raise InfrastructureError(f"run {run} has no checkpoint to begin from any more")

    def _let_go(self) -> None:
        if self._held is not None:
            store, step = self._held
            store.unpin(step)
            self._held = None

    def stop(self) -> None:
        """Stop it cleanly, the last state made durable."""
        self._let_go()
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        events, self._position = tail(self.home.folder, self._position)
        for event in events:
            self._fold(event)

    def _fold(self, event: Event) -> None:
        match event:
            case GenerationStarted():
                self._workers = event.world_size
                self._window = {step: e for step, e in self._window.items() if step < event.first_step}
            case StepCommitted():
                self._window[event.step] = event
            case Evaluated():
                self._evaluated = event
            case CheckpointWritten():
                self._written = event

    def _report(self, step: int, state: str, message: str = "") -> dict[str, Any]:
        return {
            "run": self.config.run.name,
            "values": self.values,
            "start_from": self.start_from,
            "step": step,
            "workers": self._workers,
            "state": state,
            "message": message,
            "cut_off": False,
            **self._metrics(step),
        }

    def _last_report(self, code: int) -> dict[str, Any]:
        if code == 0:
            return self._report(self.step, "complete") | {"done": True}
        said = self._log.read_text(errors="replace").splitlines() or ["it said nothing"]
        told = next((line for line in reversed(said) if line.startswith(ERROR)), said[-1])
        problem = f"exit status {code}: {told.removeprefix(ERROR)}"
        if code < 0 or code in RETRIED:
            raise InfrastructureError(f"the process of run {self.config.run.name} is gone, {problem}")
        return self._report(self.step, "failed", problem) | {"done": True}

    def _metrics(self, step: int) -> dict[str, float]:
        """Of the steps since the last report was due."""
        since = (step - 1) // self._every * self._every
        told = [e for s, e in self._window.items() if since < s <= step]
        losses = [e.loss for e in told if e.skipped is None and math.isfinite(e.loss)]
        metrics = {"train/loss": math.fsum(losses) / len(losses)} if losses else {}
        if seconds := sum(map(productive_s, told)):
            metrics["perf/tokens_per_s"] = sum(e.num_tokens for e in told) / seconds
        if self._evaluated is not None:
            metrics["eval/loss"] = self._evaluated.loss
            if self._evaluated.bits_per_byte is not None:
                metrics["eval/bits_per_byte"] = self._evaluated.bits_per_byte
        return metrics


def _legs(base: TrainConfig, name: str) -> list[str]:
    """The legs of a trial that have begun, in order."""
    storage, legs = Storage.open(base.run.storage), list[str]()
    while storage.exists(f"{(leg := f'{name}.{len(legs) + 1}' if legs else name)}/journal"):
        legs.append(leg)
    return legs


def _begun_with(base: TrainConfig, leg: str) -> TrainConfig:
    where = Storage.open(base.run.storage).run(leg)
    return TrainConfig.from_dict(json.loads(where.read("config.json")), where.uri)


def _value(config: TrainConfig, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


def _environment(pid: int) -> dict[str, str]:
    """That of the process which the user started, where the system tells it: its secrets need no other way here.

    How to authenticate at the cluster is what this process knows, which Ray has started.
    """
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return dict(os.environ)
    told = dict(os.fsdecode(entry).split("=", 1) for entry in entries if b"=" in entry)
    return told | {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}
