"""A sweep on Ray Tune: Tune decides, this project runs.

Tune chooses values, compares reports, stops trials and has them exploit each other. Each trial is an actor without a
CPU (`actor`), which starts the run's own driver (`trial`). The workers are placed by the runs themselves, within what
`Shares` allots them. Nothing that Tune writes is read by a later process: a sweep is resumed from its record.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ray

from elastictrain.config import TrainConfig
from elastictrain.errors import ConfigError
from elastictrain.inputs import check_inputs
from elastictrain.runtime.cluster import connected
from elastictrain.runtime.home import is_driven, settled
from elastictrain.runtime.stopping import stopping
from elastictrain.sweep.launch import END_TIMEOUT_S, LOOK_EVERY_S, STOP_FILE, Orders
from elastictrain.sweep.neighbours import Neighbours
from elastictrain.sweep.parent import ParentRun
from elastictrain.sweep.record import SweepRecord
from elastictrain.sweep.shares import Shares, sizes_of
from elastictrain.sweep.space import Sweep

MAX_FAILURES = 3
"""Times that a trial whose process is gone is gone on with."""
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a report of a step whose loss is no number has none
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

Tell = Callable[[str], None]


def run_sweep(sweep: Sweep, config: TrainConfig, tell: Tell) -> SweepRecord:
    """Run the trials that have not ended, until all have or a stop is asked for (SIGTERM, SIGINT).

    Raises what ElasticTrainer.fit raises before a run begins, and RunConflictError where another process runs it.
    """
    _check_installed(sweep)
    config = settled(config)
    check_inputs(config)
    budget, sizes = sweep.workers or config.elastic.max_workers, sizes_of(config)
    if not sizes or budget < sizes[0]:
        raise ConfigError(
            f"workers {budget} is too few: a trial needs {sizes[0] if sizes else config.elastic.min_workers} "
            "(elastic.min_workers, parallel.*). Give the sweep more workers."
        )
    record = SweepRecord(sweep, config)
    with record.locked(), stopping() as stop:
        record.started_at = record.started_at or time.time()
        if not record.is_over:
            scratch = Path(tempfile.mkdtemp(prefix="et-sweep-"))
            stop.told = lambda reason: (scratch / STOP_FILE).touch()
            try:
                with connected(_for_budget(config, budget)):
                    stop.install()
                    _run(record, config, budget, scratch, tell)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return record


def _check_installed(sweep: Sweep) -> None:
    needed = ("pandas", "tensorboardX", *(("optuna",) if sweep.search == "optuna" else ()))
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ConfigError(f"a sweep needs {', '.join(missing)}: pip install 'elastictrain[tune]'")


def _run(record: SweepRecord, config: TrainConfig, budget: int, scratch: Path, tell: Tell) -> None:
    sweep, context = record.sweep, ray.get_runtime_context()
    parent = ParentRun(record, config, tell)
    Orders(
        config=config.to_dict(),
        sweep=sweep.model_dump(mode="json", exclude_unset=True),
        address=context.gcs_address,
        parent=parent.run_id,
        driver_pid=os.getpid(),
        folder=os.getcwd(),
    ).write(scratch)
    neighbours = Neighbours(record.storage.uri, tell)
    try:
        _tuner(record, config, budget, scratch, neighbours, tell).fit()
    finally:
        _wait_for_runs(record, config)
        neighbours.leave()
        record.write()
        parent.end()


def _for_budget(config: TrainConfig, budget: int) -> TrainConfig:
    """A config for the cluster alone: an embedded one has room for all trials."""
    elastic = config.elastic.model_copy(update={"max_workers": budget, "standby": 0})
    return config.model_copy(update={"elastic": elastic})


def _wait_for_runs(record: SweepRecord, config: TrainConfig) -> None:
    """Until no trial's process writes its last state any more: an embedded cluster ends after this."""
    deadline = time.monotonic() + END_TIMEOUT_S
    folders = [record.folder.parents[1] / leg.run for trial in record.trials.values() for leg in trial.legs]
    while any(map(is_driven, folders)) and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY_S)


def _tuner(
    record: SweepRecord, config: TrainConfig, budget: int, scratch: Path, neighbours: Neighbours, tell: Tell
) -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from ray import tune

    from elastictrain.sweep.actor import TrialActor
    from elastictrain.sweep.choosing import scheduler_of, search_of, values_of
    from elastictrain.sweep.watch import StopWhen, Watch

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are told by `Watch`
    warnings.filterwarnings("ignore", category=UserWarning, module="ray.tune")  # advice on actors that do the training
    sweep, steps = record.sweep, config.train.steps
    here = ray.get_runtime_context().get_node_id()
    address = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here)
    at_a_time = max(budget // sizes_of(config)[0], 1)
    at_a_time = min(sweep.concurrent or at_a_time, at_a_time)
    search = search_of(record)
    trials = {} if search is not None else {"trial": tune.grid_search(values_of(record))}
    return tune.Tuner(
        tune.with_resources(TrialActor, tune.PlacementGroupFactory([{f"node:{address}": 0.001}])),
        param_space={**trials, "scratch": str(scratch)},
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler_of(record, steps, at_a_time),
            num_samples=1 if search is None else -1,
            max_concurrent_trials=at_a_time,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[Watch(record, Shares(config, budget, scratch, neighbours), tell)],
            stop=StopWhen(scratch / STOP_FILE),
        ),
    )
