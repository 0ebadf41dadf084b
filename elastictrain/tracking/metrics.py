"""The metrics that a live run exports, defined once (pure): their names, what they mean, and their values now.

`runtime.exporter` hands them to Ray's own Prometheus endpoint on each node, and `grafana` makes a dashboard of them.
Prometheus sees each under its name here with `ray_` before it, and with the labels `run` and those that it names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from elastictrain.events import (
    CheckpointWritten,
    Event,
    FailureDetected,
    LayoutChosen,
    NodesMeasured,
    RanksTimed,
    RunStarted,
    StepCommitted,
)
from elastictrain.status import Status
from elastictrain.tracking.cost import cost_of, price_of
from elastictrain.tracking.ledger import Goodput
from elastictrain.tracking.step_times import waits_of

Unit = Literal["", "s", "tokens/s", "ratio", "bytes"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, a gauge."""

    name: str
    meaning: str
    unit: Unit = ""
    labels: tuple[str, ...] = ()
    """Beside `run`."""


class Reading(NamedTuple):
    """A metric's value now."""

    metric: Metric
    value: float
    labels: dict[str, str]


STEP = Metric("elastictrain_step", "Last committed step")
STEPS = Metric("elastictrain_steps", "Steps in the whole run")
LOSS = Metric("elastictrain_loss", "Training loss of the last step that counts")
SPEED = Metric(
    "elastictrain_tokens_per_second", "Tokens a second of compute and communication, over the last steps", "tokens/s"
)
STEP_S = Metric("elastictrain_step_seconds", "Seconds of the last step", "s")
WAIT_S = Metric("elastictrain_wait_seconds", "Seconds that ranks waited in the last step, on average", "s", ("reason",))
GAUGE = Metric("elastictrain_model_gauge", "What the model tells of the last step, by name", "", ("gauge",))
WORKERS = Metric("elastictrain_world_size", "Ranks of the generation")
STANDBYS = Metric("elastictrain_standbys", "Warm spare workers")
NODES = Metric("elastictrain_nodes", "Ray nodes that the run knows of")
GENERATION = Metric("elastictrain_generation", "Number of the generation")
RUNNING = Metric("elastictrain_running", "1 while the run trains, 0 while it recovers, waits, starts or ends")
GOODPUT = Metric("elastictrain_goodput_ratio", "Part of the wall time in which steps that count were computed", "ratio")
BUCKET_S = Metric("elastictrain_wall_seconds", "Seconds of the run so far, by bucket of the ledger", "s", ("bucket",))
WORKER_S = Metric("elastictrain_worker_seconds", "Seconds of all workers so far, by bucket", "s", ("bucket",))
FAILURES = Metric("elastictrain_failures", "Failures so far")
LOST_STEPS = Metric("elastictrain_lost_steps", "Finished steps that had to be done again, so far")
RECOVERY_S = Metric("elastictrain_recovery_seconds", "From the last fault to the first new step", "s")
CHECKPOINT = Metric("elastictrain_checkpoint_step", "Step of the newest durable checkpoint")
CHECKPOINT_AT = Metric("elastictrain_checkpoint_written_at", "When that was complete, unix time", "s")
CHECKPOINT_S = Metric("elastictrain_checkpoint_seconds", "Seconds that writing it took, beside the training", "s")
RANK_STEP = Metric("elastictrain_rank_step", "Step that a rank is at", "", ("rank", "node"))
RANK_S = Metric("elastictrain_rank_own_seconds", "A rank's own work in a step, without its waits", "s", ("rank",))
RANK_BYTES = Metric("elastictrain_rank_memory_bytes", "In use on a rank's device", "bytes", ("rank",))
PLAN_BYTES = Metric("elastictrain_plan_memory_bytes", "What the plan says that a rank needs", "bytes")
COST = Metric("elastictrain_cost", "What the run cost so far, in the currency of cluster.worker_cost_per_hour")

METRICS = (
    STEP,
    STEPS,
    LOSS,
    SPEED,
    STEP_S,
    WAIT_S,
    GAUGE,
    WORKERS,
    STANDBYS,
    NODES,
    GENERATION,
    RUNNING,
    GOODPUT,
    BUCKET_S,
    WORKER_S,
    FAILURES,
    LOST_STEPS,
    RECOVERY_S,
    CHECKPOINT,
    CHECKPOINT_AT,
    CHECKPOINT_S,
    RANK_STEP,
    RANK_S,
    RANK_BYTES,
    PLAN_BYTES,
    COST,
)


class Latest:
    """A fold over the events: the last word of each kind that tells how it is now. It holds an event of each."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.num_failures = 0
        self.price: float | None = None
        """Of a worker for an hour."""
        self.step: StepCommitted | None = None
        self.checkpoint: CheckpointWritten | None = None
        self.timed: RanksTimed | None = None
        self.measured: NodesMeasured | None = None
        self.chosen: LayoutChosen | None = None
        for event in events:
            self.add(event)

    def add(self, event: Event) -> None:
        """Take in the next event."""
        match event:
            case RunStarted():
                self.price = price_of(event.config)
            case StepCommitted():
                self.step = event
            case FailureDetected():
                self.num_failures += 1
            case CheckpointWritten():
                self.checkpoint = event
            case RanksTimed():
                self.timed = event
            case NodesMeasured():
                self.measured = event
            case LayoutChosen():
                self.chosen = event


def readings(status: Status, latest: Latest, ledger: Goodput) -> Iterator[Reading]:
    """What there is to tell of a run now."""
    yield from _of_status(status)
    yield Reading(FAILURES, latest.num_failures, {})
    for bucket in ledger.run_us:
        yield Reading(BUCKET_S, ledger.seconds[bucket], {"bucket": bucket})
        yield Reading(WORKER_S, ledger.worker_seconds[bucket], {"bucket": bucket})
    if (cost := cost_of(latest.price, ledger)) is not None:
        yield Reading(COST, cost, {})
    if (step := latest.step) is not None:
        waits = waits_of(step)
        yield Reading(STEP_S, step.finished_at - step.begun_at, {})
        for reason, seconds in (("data", waits.data_s), ("peers", waits.peers_s), ("snapshot", waits.snapshot_s)):
            yield Reading(WAIT_S, seconds, {"reason": reason})
        for name, value in step.gauges.items():
            yield Reading(GAUGE, value, {"gauge": name})
    if (checkpoint := latest.checkpoint) is not None:
        yield Reading(CHECKPOINT, checkpoint.step, {})
        yield Reading(CHECKPOINT_AT, checkpoint.at, {})
        yield Reading(CHECKPOINT_S, checkpoint.seconds, {})
    if (timed := latest.timed) is not None and timed.generation == status.generation:
        for rank, seconds in enumerate(timed.own_s):
            yield Reading(RANK_S, seconds, {"rank": str(rank)})
    if (measured := latest.measured) is not None and len(measured.rank_memory_bytes) == status.world_size:
        for rank, num_bytes in enumerate(measured.rank_memory_bytes):
            yield Reading(RANK_BYTES, num_bytes, {"rank": str(rank)})
    if (chosen := latest.chosen) is not None and chosen.memory_bytes is not None:
        yield Reading(PLAN_BYTES, chosen.memory_bytes, {})


def _of_status(status: Status) -> Iterator[Reading]:
    for metric, value in (
        (STEP, status.step),
        (STEPS, status.steps),
        (SPEED, status.tokens_per_s),
        (WORKERS, status.world_size),
        (STANDBYS, len(status.standbys)),
        (NODES, len(status.nodes)),
        (GENERATION, status.generation),
        (RUNNING, status.status == "running"),
        (GOODPUT, status.goodput),
        (LOST_STEPS, status.lost_steps),
    ):
        yield Reading(metric, float(value), {})
    if status.loss is not None:
        yield Reading(LOSS, status.loss, {})
    if status.last_recovery_s is not None:
        yield Reading(RECOVERY_S, status.last_recovery_s, {})
    for worker in status.workers:
        yield Reading(RANK_STEP, worker.step, {"rank": str(worker.rank), "node": worker.node})
