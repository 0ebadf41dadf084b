"""`ElasticTrainer(config).fit()`: everything put together, in the order in which it happens.

storage, lock, config of the run -> corpus -> cluster -> token shards -> supervisor -> last checkpoint -> evaluation
-> report

A driver of a run that learns text does without torch, which costs 2 s to import.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from elastictrain.attempt import FLUSH_TIMEOUT_S, REPORT, Attempt, steps_done, write_report
from elastictrain.checkpoint.of_run import checkpoints_of
from elastictrain.checkpoint.store import CheckpointStore
from elastictrain.config import TrainConfig
from elastictrain.control.vocabulary import End
from elastictrain.data.prepare import prepare
from elastictrain.errors import BadLossError, ElasticTrainError, InfrastructureError, UserCodeError, in_a_line
from elastictrain.events import (
    Cause,
    DataReady,
    Evaluated,
    Event,
    GenerationStarted,
    RunEnded,
    Warned,
)
from elastictrain.inputs import check_inputs
from elastictrain.plan.auto import rung_of
from elastictrain.planning import plans_of
from elastictrain.progress import PlainLines, ProgressListener
from elastictrain.runtime.branch import branch, check_branch
from elastictrain.runtime.cluster import check_reachable, connected
from elastictrain.runtime.estate import end_orphans
from elastictrain.runtime.fleet import Allotment, Fleet
from elastictrain.runtime.home import RunHome, refuse_fewer_steps, settled
from elastictrain.runtime.job_folder import import_all
from elastictrain.runtime.resume import StartPoint, next_generation, start_point
from elastictrain.runtime.stopping import stopping
from elastictrain.runtime.supervisor import Supervisor
from elastictrain.runtime.tracker import TrackingWatch, start_tracker, tracking_uri
from elastictrain.tracking.deliver import Deliverer, is_delivered
from elastictrain.tracking.journal import JournalReader
from elastictrain.tracking.report import build_report
from elastictrain.tracking.wording import count_text
from elastictrain.workloads import build_workload

SAVE_TIMEOUT_S = 600.0
_AGAIN = "the run goes on from {}: {} that were done before, up to step {}, are done again"
_STILL_LEANER = (
    "the run goes on with {}, to which it has come for lack of memory. Another train.micro_batch, "
    "train.activation_checkpointing, parallel.* or cluster.device_memory is tried as it is."
)
_UNSAVED = (
    "the run is {}, but its last state could not be written to {}: see the warnings above. Make room there and submit "
    "again: it goes on from step {}, the last that is durable."
)
_PLACES = {"fresh": "its beginning", "durable": "the checkpoint of step {}", "memory": "step {} in memory"}


@dataclass(frozen=True)
class Result:
    """What a call of `fit` came to."""

    run: str
    status: str
    steps: int
    metrics: dict[str, float]
    checkpoint: str | None
    """URI of the newest durable checkpoint."""
    run_id: str | None
    """Of the MLflow run; None while MLflow has not been reached."""
    report: Path
    """One self-contained HTML file."""
    mlflow_uri: str
    recorded: bool
    """Whether MLflow has taken everything; what is missing is delivered when the run is submitted again."""
    evaluation: Evaluated | None
    report_data: dict[str, Any] = field(repr=False)
    """As `elastictrain report --json` prints it; see docs/report.md."""


class ElasticTrainer:
    """Trains the run that the config describes, or continues it from where it stands."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        progress: ProgressListener | Literal["lines"] | None = "lines",
        allotment: Allotment = lambda: None,
    ) -> None:
        """`progress` hears what happens; "lines" prints it, a line for each notable event; None is silent.

        `allotment` says which part of the cluster is this run's, by Ray's node id, and may say otherwise later: the
        run gives up workers, or takes more, at the next step boundary. None is all of it.
        """
        self.config, self._allotment = settled(config), allotment
        self._progress = PlainLines(sys.stdout) if progress == "lines" else progress

    def fit(self) -> Result:
        """Train to the end, or until a stop is asked for (SIGTERM, SIGINT).

        Raises ConfigError, DataError or RunConflictError before anything starts; UserCodeError with the first rank's
        traceback when the model or data code keeps failing; InfrastructureError when the cluster can't go on.
        """
        check_inputs(self.config)
        check_branch(self.config)
        self._home = RunHome(self.config)
        self._told = JournalReader(self._home.folder)
        with stopping() as self._stop, self._home.locked():
            return self._complete_already() or self._attempt()

    def _complete_already(self) -> Result | None:
        earlier = self._told.events()
        self._home.check_config(begun=any(isinstance(e, GenerationStarted) for e in earlier))
        refuse_fewer_steps(self.config, steps_done(earlier))
        if _is_complete(earlier, self.config.train.steps):
            run_id = self._deliver_rest()
            if not (self._home.folder / REPORT).exists():  # its driver died after the last step
                write_report(self._home, earlier, self._progress.on_event if self._progress else lambda event: None)
            return self._result(earlier, run_id)
        if self.config.data.samples is not None:
            from elastictrain.data.samples import refuse_other_samples

            refuse_other_samples(self.config, next((e for e in earlier if isinstance(e, DataReady)), None))
        return None

    def _attempt(self) -> Result:
        config, run_id = self.config, None
        import_all(own_model=config.model.kind != "transformer")
        attempt = Attempt(config, self._home, self._told, self._progress, self._stop)
        try:
            check_reachable(config)
            attempt.begin()
            with connected(config) as cluster:
                attempt.joined(cluster)
                self._stop.install()
                tracker = attempt.watch.tracker = start_tracker(config, self._home, attempt.number)
                try:
                    end = self._train(attempt, tracker)
                    attempt.end(end)
                except BaseException as error:
                    end = _end_of(error)
                    if end.status == "stopped":
                        end_orphans(config)  # there are some where nobody had taken them over yet
                    attempt.end(end)
                    raise
                finally:
                    run_id = attempt.flush(tracker)
        except BaseException as error:
            attempt.end(_end_of(error))
            raise
        finally:
            attempt.close()
        if end.status == "failed":
            raise _error(end.cause or Cause("unknown", "the run failed"))
        return self._result(attempt.events(), run_id)

    def _train(self, attempt: Attempt, tracker: Any) -> End:
        config, live, emit = self.config, attempt.live, attempt.emit
        store = checkpoints_of(config)
        live.publish(None, None, {}, force=True)
        data_folder, vocab_size = self._prepare(emit)
        if config.model.kind != "transformer" or config.model.path is not None:
            build_workload(config, vocab_size)  # what is wrong with the user's model is told before a worker starts
        live.status = "starting"
        branch(config, store, self._told.events(), emit)
        fleet = Fleet(config, secrets.token_bytes(32), self._allotment)
        plans = plans_of(config, fleet.figures(), vocab_size)
        start = self._start_point(fleet, store, emit, tracker)
        self._told.forget()
        live.step = start.restore.step
        if start.restore.step >= config.train.steps:
            _close(fleet, emit)
            return End("complete")  # cut off after its last checkpoint: there is nothing left to train
        rung = rung_of(plans, start.in_force) if start.in_force else 0
        if rung and start.in_force:
            emit(Warned(time.time(), "memory", _STILL_LEANER.format(start.in_force)))
        fleet.zero_stage = plans[rung][max(plans[rung])].layout.zero_stage
        supervisor = Supervisor(config, fleet, data_folder, store, start, plans[rung:], live, emit)
        self._stop.told = supervisor.stop
        try:
            end = supervisor.run()
            supervisor.show("finishing")
            saved = supervisor.save_newest(SAVE_TIMEOUT_S)
            done, kept = live.step, max((stored.step for stored in store.list()), default=0)
            if end.status in ("complete", "stopped") and not saved and done > kept:
                what = "trained" if end.status == "complete" else f"stopped at step {done}"
                raise InfrastructureError(_UNSAVED.format(what, store.uri(done), kept))
            if end.status == "complete":
                self._evaluate(supervisor, emit)
            return end
        finally:
            _close(fleet, emit)

    def _prepare(self, emit: Callable[[Event], None]) -> tuple[str, int]:
        """Have the samples ready; the folder of prepared text and its vocabulary's size, nothing where it is none."""
        config, begun = self.config, time.monotonic()
        if config.data.samples is not None:
            from elastictrain.data.samples import look_at_named

            found = look_at_named(config)
            told = (config.data.samples, found.sha256, found.num_samples, found.num_validation_samples)
            emit(DataReady(time.time(), *told, seconds=time.monotonic() - begun, reused=True))
            return "", 0
        prepared = prepare(config, self._home.data)
        manifest = prepared.manifest
        emit(
            DataReady(
                time.time(),
                str(manifest.folder),
                manifest.sha256(),
                manifest.num_samples,
                manifest.num_validation_samples,
                prepared.seconds,
                prepared.reused,
            )
        )
        return str(manifest.folder), manifest.vocab_size

    def _start_point(
        self, fleet: Fleet, store: CheckpointStore, emit: Callable[[Event], None], tracker: Any
    ) -> StartPoint:
        """Where to begin. What fails here leaves an earlier driver's keepers to the next attempt."""
        earlier = self._told.events()
        estate = fleet.take_over(next_generation(earlier))
        start = start_point(self.config, earlier, estate, lambda: ray.get(tracker.recorded.remote()), store, emit)
        if start.restore.source != "memory":
            fleet.disown()
        done, restored = steps_done(earlier), start.restore
        if done > restored.step:
            place, again = _PLACES[restored.source].format(restored.step), count_text(done - restored.step, "step")
            emit(Warned(time.time(), "resume", _AGAIN.format(place, again, done)))
        return start

    def _evaluate(self, supervisor: Supervisor, emit: Callable[[Event], None]) -> None:
        step = self.config.train.steps
        try:
            found = supervisor.evaluate(step)
        except RayError as error:
            emit(Warned(time.time(), "evaluation", f"the model could not be evaluated: {str(error).splitlines()[-1]}"))
            return
        emit(
            Evaluated(
                time.time(),
                step,
                found.loss,
                found.bits_per_byte,
                found.gzip_bits_per_byte,
                found.num_bytes,
                found.sample,
            )
        )

    def _deliver_rest(self) -> str | None:
        """Deliver what MLflow could not take while the run was trained; its run id."""
        config = self.config
        uri, tracking = tracking_uri(config, self._home), config.tracking
        deliverer = Deliverer(self._home.folder, uri, tracking.experiment, config.run.name, tracking.parent)
        if not deliverer.is_done():
            delivery = deliverer.deliver(FLUSH_TIMEOUT_S)
            if self._progress is not None:
                TrackingWatch(self._progress.on_event).hear(delivery, over=True)
        return deliverer.run_id or None

    def _result(self, events: Sequence[Event], run_id: str | None) -> Result:
        report = build_report(events, delivered=is_delivered(self._home.folder))
        kept = [c for c in report["checkpoints"] if not c["removed"]]
        metrics = {f"perf/{key}": value for key, value in report["throughput"].items()}
        metrics["goodput/ratio"] = report["goodput"]["ratio"]
        if report["loss"]:
            metrics["train/loss"] = float(report["loss"][-1][1])
        evaluation = next((e for e in reversed(events) if isinstance(e, Evaluated)), None)
        if evaluation is not None:
            metrics["eval/loss"] = evaluation.loss
            if evaluation.bits_per_byte is not None:
                metrics["eval/bits_per_byte"] = evaluation.bits_per_byte
        return Result(
            run=self.config.run.name,
            status=report["status"],
            steps=report["steps"],
            metrics=metrics,
            checkpoint=kept[-1]["uri"] if kept else None,
            run_id=run_id,
            report=self._home.folder / REPORT,
            mlflow_uri=tracking_uri(self.config, self._home),
            recorded=is_delivered(self._home.folder),
            evaluation=evaluation,
            report_data=report,
        )


def _close(fleet: Fleet, emit: Callable[[Event], None]) -> None:
    if left := fleet.close():
        emit(Warned(time.time(), "cluster", left))


def _is_complete(events: Sequence[Event], steps: int) -> bool:
    last = next((e for e in reversed(events) if isinstance(e, RunEnded)), None)
    return last is not None and last.status == "complete" and last.step >= steps


def _end_of(error: BaseException) -> End:
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return End("stopped", Cause("stop", str(error) or "interrupted"))
    return End("failed", Cause("exception", *in_a_line(error), type(error).__name__))


def _error(cause: Cause) -> ElasticTrainError:
    if cause.kind == "bad_loss":
        return BadLossError(cause.message)
    if cause.kind == "exception":
        return UserCodeError(f"{cause.traceback.rstrip()}\n\nThe run ended: {cause.message}".lstrip())
    return InfrastructureError(f"{cause.message}")
