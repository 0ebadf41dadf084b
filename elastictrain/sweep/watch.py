"""What Ray Tune tells of the trials: into the sweep's record, to the user, and to whoever divides the workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.tune import Callback, Stopper

from elastictrain.sweep.record import FINAL, SweepRecord, Trial
from elastictrain.sweep.shares import Shares
from elastictrain.sweep.table import value_text, values_text
from elastictrain.tracking.wording import count_text


class Watch(Callback):  # type: ignore[misc]  # Ray has no types
    """Called by Tune's loop, in the driver."""

    def __init__(self, record: SweepRecord, shares: Shares, tell: Any) -> None:
        self._record, self._shares, self._tell = record, shares, tell
        self._known: dict[str, Trial] = {}

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Called often."""
        live = {self._name(t): self._trial(t).values for t in trials if t.status == "RUNNING"}
        changed = self._shares.follow(live)
        if changed:
            self._tell("workers: " + ", ".join(f"{name} {number}" for name, number in changed.items()))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial begins, or goes on."""
        known = self._trial(trial)
        known.state = "running"
        self._record.write()
        self._tell(f"{self._name(trial)} starts: {values_text(trial.config['trial']['values'])}")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """A report."""
        known = self._trial(trial)
        begun = {leg.run for leg in known.legs}
        known.take(result, self._record.sweep.metric)
        self._record.write()
        if result["run"] not in begun and result["start_from"]:
            self._tell(f"{self._name(trial)} goes on from {result['start_from']}: {values_text(known.values)}")
        metric = self._record.sweep.metric
        score = f"{metric} {value_text(result[metric])}" if metric in result else "no score"
        told = f"{self._name(trial)} step {known.step}: {score}, {count_text(known.workers, 'worker')}"
        self._tell(told if known.state == "running" else f"{told}, {known.state} {known.message}".rstrip())

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Its process is gone, and another goes on."""
        self._tell(f"{self._name(trial)} goes on after a failure")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """It has ended, or was stopped by the scheduler; on a stop of the whole sweep it is still under way."""
        known = self._trial(trial)
        if known.state not in FINAL and not trial.last_result.get("cut_off", True):
            known.state = "stopped"
            self._tell(f"{self._name(trial)} stopped by {self._record.sweep.scheduler} at step {known.step}")
        self._record.write()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """It is given up."""
        known = self._trial(trial)
        told = Path(trial.error_file).read_text() if trial.error_file else ""
        known.state, known.message = "failed", next(filter(None, reversed(told.splitlines())), "")
        self._record.write()
        self._tell(f"{self._name(trial)} failed: {known.message}")

    def _trial(self, trial: Any) -> Trial:
        told = trial.config["trial"]  # with PBT another's, later on
        return self._known.setdefault(trial.trial_id, self._record.trials[told["number"]])

    def _name(self, trial: Any) -> str:
        return f"{self._record.sweep.name}-{self._trial(trial).number}"


class StopWhen(Stopper):  # type: ignore[misc]  # Ray has no types
    """Stops the sweep when this file is there."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial is stopped by this."""
        return False

    def stop_all(self) -> bool:
        """Whether to stop."""
        return self._file.exists()
