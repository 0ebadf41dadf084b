"""Which values are tried, and which trials go on: the space file in Ray Tune's terms.

Drawn values depend on nothing but the seed and the number of the trial, so a sweep that is resumed goes on with the
same ones. What ended before is told to Optuna and to ASHA anew.
"""

from __future__ import annotations

import logging
import random
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining
from ray.tune.search import Searcher

from elastictrain.sweep.record import FINAL, SweepRecord, Trial
from elastictrain.sweep.space import Domain, Sweep

TIME = "step"


def values_of(record: SweepRecord) -> list[dict[str, Any]]:
    """Number and values of each trial that has not ended, in order."""
    sweep = record.sweep
    drawn = (
        list(sweep.grid()) if sweep.search == "grid" else [_draw(sweep, n) for n in range(1, (sweep.trials or 0) + 1)]
    )
    for number, values in enumerate(drawn, start=1):
        record.add(number, values)
    return [_told(trial) for trial in record.unfinished()]


def search_of(record: SweepRecord) -> Searcher | None:
    """What chooses values from what others came to; None where they are known beforehand."""
    return Suggestions(record) if record.sweep.search == "optuna" else None


def scheduler_of(record: SweepRecord, steps: int, at_a_time: int) -> Any:
    """What stops trials, or has them exploit each other; so many can train at a time."""
    sweep = record.sweep
    common = {"time_attr": TIME, "metric": sweep.metric, "mode": sweep.mode}
    match sweep.scheduler:
        case "asha":
            grace = min(sweep.steps_of_grace(steps), steps)
            asha = ASHAScheduler(**common, max_t=steps + 1, grace_period=grace, reduction_factor=sweep.reduction)
            for trial in (t for t in record.trials.values() if t.state in FINAL):
                stand_in = SimpleNamespace(trial_id=f"ended-{trial.number}")
                asha.on_trial_add(None, stand_in)
                for step, score in trial.points:
                    asha.on_trial_result(None, stand_in, {TIME: step, sweep.metric: score})
            return asha
        case "pbt":
            random.seed(sweep.seed)
            return Population(
                all_at_once=at_a_time >= len(record.unfinished()),
                **common,
                perturbation_interval=sweep.steps_of_grace(steps),
                hyperparam_mutations={"trial": {"values": {k: _mutation(d) for k, d in sweep.space.items()}}},
                custom_explore_fn=_Within(sweep),
                require_attrs=False,
                log_config=False,
            )
    return FIFOScheduler()


class Population(PopulationBasedTraining):  # type: ignore[misc]  # Ray has no types
    """Tune's, but for this: where all trials train at once, none is paused for one that is just changing its leg."""

    def __init__(self, *, all_at_once: bool, **options: Any) -> None:
        self._all_at_once = all_at_once
        super().__init__(**options)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """What to do with the trial."""
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if decision == self.PAUSE and self._all_at_once else decision


class Suggestions(Searcher):  # type: ignore[misc]  # Ray has no types
    """Optuna's, through Ray Tune, after the trials that are under way."""

    def __init__(self, record: SweepRecord) -> None:
        from ray.tune.search.optuna import OptunaSearch

        logging.getLogger("optuna").setLevel(logging.WARNING)
        self._record, sweep = record, record.sweep
        known = record.trials.values()
        self._waiting, self._asked = record.unfinished(), set[str]()
        self._trials: dict[str, Trial] = {}
        space = {key: domain_of(domain) for key, domain in sweep.space.items()}
        seed = sweep.seed + len(known)  # the same again would suggest the same again
        self._optuna = OptunaSearch(space, metric=sweep.metric, mode=sweep.mode, seed=seed)
        for trial in known:
            if trial.state in FINAL and trial.score is not None:
                self._optuna.add_evaluated_point(trial.values, trial.score)
        super().__init__(metric=sweep.metric, mode=sweep.mode)

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        """Tune offers its own word for metric and space."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """Number and values of the next trial."""
        if self._waiting:
            trial = self._waiting.pop(0)
        elif len(self._record.trials) >= (self._record.sweep.trials or 0):
            return Searcher.FINISHED
        else:
            self._asked.add(trial_id)
            trial = self._record.add(len(self._record.trials) + 1, self._optuna.suggest(trial_id))
        self._trials[trial_id] = trial
        return {"trial": _told(trial)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna."""
        trial = self._trials[trial_id]
        if trial_id in self._asked:
            self._optuna.on_trial_complete(trial_id, result, error or trial.score is None)
        elif trial.score is not None:
            self._optuna.add_evaluated_point(trial.values, trial.score)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the sweep's record has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Refused: it would read pickles, and a sweep goes on from its own record."""
        raise RuntimeError(f"a sweep does not go on from Ray Tune's own state ({checkpoint_path}), but from its record")


def domain_of(domain: Domain) -> Any:
    """The values of a field, as Ray Tune has them."""
    match domain.kind:
        case "choice":
            return tune.choice(list(domain.choice or ()))
        case "uniform":
            return tune.uniform(*domain.ends)
        case "loguniform":
            return tune.loguniform(*domain.ends)
    low, high = domain.ends
    return tune.randint(low, high + 1)


class _Within:
    """Brings what PBT's factors gave back into the space."""

    def __init__(self, sweep: Sweep) -> None:
        self._space = sweep.space

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        values = config["trial"]["values"]
        for key, domain in self._space.items():
            if not domain.choice:
                low, high = domain.ends
                values[key] = min(max(values[key], low), high)
        return config


def _mutation(domain: Domain) -> Any:
    return list(domain.choice) if domain.choice else domain_of(domain)


def _draw(sweep: Sweep, number: int) -> dict[str, Any]:
    def draw(key: str, domain: Domain) -> Any:
        state = np.random.RandomState(zlib.crc32(f"{sweep.seed} {number} {key}".encode()))
        value = domain_of(domain).sample(random_state=state)
        return value.item() if isinstance(value, np.generic) else value

    return {key: draw(key, domain) for key, domain in sweep.space.items()}


def _told(trial: Trial) -> dict[str, Any]:
    return {"number": trial.number, "values": trial.values}
