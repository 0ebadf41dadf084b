"""What the MLflow run holds, as a fold over the journal (pure).

The same events give the same metrics with the same times and steps, however they are cut into batches: so delivering
twice is harmless, and what a dead server missed can be delivered at any later time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from elastictrain.config import flatten
from elastictrain.events import (
    CheckpointWritten,
    Evaluated,
    Event,
    FailureDetected,
    GenerationStarted,
    LayoutChosen,
    NodesMeasured,
    Recovered,
    RunEnded,
    RunStarted,
    StepCommitted,
    Warned,
)
from elastictrain.plan.layout import Layout
from elastictrain.tracking.cost import cost_of, price_of
from elastictrain.tracking.family import Family, Kin
from elastictrain.tracking.ledger import productive_s
from elastictrain.tracking.redact import redact, redact_all
from elastictrain.tracking.running_ledger import RunningLedger

Point = tuple[str, float, int, int]
"""Metric name, value, unix time in milliseconds, step."""

MLFLOW_STATUS = {"running": "RUNNING", "complete": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_NOT_IN_A_NAME = re.compile(r"[^\w.: /-]")
"""What MLflow refuses in a metric's name."""
MAX_VALUE_LENGTH = 4000
"""Longer tags and params are cut: MLflow's limit is 5000 to 8000, depending on the store."""


@dataclass(frozen=True, slots=True)
class CheckpointTags:
    """A checkpoint as the MLflow run lists it: all of its tags, so that the last telling is the truth."""

    step: int
    uri: str
    """Without user name and password, where the storage's URI has them."""
    tags: dict[str, str]


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that is trained to its end: its last checkpoint becomes a version of the registered model."""

    run: str
    uri: str
    """Of the checkpoint, as in `CheckpointTags`."""


@dataclass(slots=True)
class Batch:
    """What some events add to the MLflow run."""

    metrics: list[Point] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    params: list[dict[str, str]] = field(default_factory=list)
    """The flattened config of each attempt."""
    checkpoints: dict[str, CheckpointTags] = field(default_factory=dict)
    """By URI, those of which something changed."""
    configs: dict[int, dict[str, Any]] = field(default_factory=dict)
    """The whole config of each attempt."""
    finished: Finished | None = None
    status: str | None = None
    """MLflow's word for it; None for no change."""
    ended_at_ms: int | None = None
    """Set where the status is a final one."""


class Lineage:
    """The fold. What it holds grows with checkpoints and failures, not with steps."""

    def __init__(self, history: Callable[[], Iterable[Event]]) -> None:
        """`history` gives the run's events from the first on, as for `RunningLedger`."""
        self._ledger = RunningLedger(history)
        self.family = Family()
        self._open_failures: list[FailureDetected] = []
        self._step, self._run = 0, ""
        self._price: float | None = None
        self._best = self._last = ""

    def add(self, events: Iterable[Event]) -> Batch:
        """Take these events in; what they add."""
        batch = Batch()
        changed: set[str] = set()
        for event in events:
            self._ledger.add(event)
            if about := self.family.add(event):
                changed |= {*about, self._best, self._last}
                self._best, self._last = self.family.best, self.family.last
                changed |= {self._best, self._last}
            self._tell(event, batch)
        if changed:
            self._tell_checkpoints(changed, batch)
        return batch

    def _tell_checkpoints(self, changed: set[str], batch: Batch) -> None:
        best, last = self._best, self._last
        for uri, kin in self.family.members.items():
            if uri in changed:
                tags = _checkpoint_tags(kin) | {"best": _yes(uri == best), "last": _yes(uri == last)}
                tags = {f"elastictrain.{name}": cut(value) for name, value in tags.items()}
                batch.checkpoints[uri] = CheckpointTags(kin.written.step, redact(uri), tags)
        batch.tags |= {
            "elastictrain.best_checkpoint": cut(redact(best)),
            "elastictrain.last_checkpoint": cut(redact(last)),
        }

    def _tell(self, event: Event, batch: Batch) -> None:
        if isinstance(event, StepCommitted):
            self._step = event.step
            batch.metrics += _step_points(event)
        elif isinstance(event, RunStarted):
            self._open_failures.clear()
            self._run, self._price = event.run, price_of(event.config)
            batch.params.append({key: _param(value) for key, value in flatten(redact_all(event.config))})
            batch.configs[event.attempt] = redact_all(event.config)
            batch.status, batch.ended_at_ms = "RUNNING", None
            batch.tags |= {"elastictrain.status": "running", "elastictrain.attempts": str(event.attempt)}
            batch.tags |= {f"environment.{k}": cut(redact(v)) for k, v in event.environment.items()}
        elif isinstance(event, GenerationStarted):
            batch.metrics.append(_point("ft/world_size", event.world_size, event.at, event.first_step))
        elif isinstance(event, LayoutChosen):
            batch.tags |= {f"plan.{name}": cut(value) for name, value in _plan_tags(event)}
        elif isinstance(event, NodesMeasured):
            batch.metrics += _node_points(event)
        elif isinstance(event, FailureDetected):
            self._open_failures.append(event)
            batch.metrics.append(_point("ft/detected_s", event.detected_at - event.at, event.detected_at, event.step))
            who = f", rank {', '.join(map(str, event.ranks))}" if event.ranks else ""
            what = f"step {event.step}{who}: {event.kind}: {event.cause.message}"
            batch.tags["elastictrain.last_failure"] = cut(redact(what))
        elif isinstance(event, Recovered):
            batch.metrics += self._recovery_points(event)
        elif isinstance(event, CheckpointWritten):
            batch.metrics.append(_point("ckpt/write_s", event.seconds, event.at, event.step))
        elif isinstance(event, Evaluated):
            batch.metrics.append(_point("eval/loss", event.loss, event.at, event.step))
            for name in ("bits_per_byte", "gzip_bits_per_byte"):
                if (bits := getattr(event, name)) is not None:
                    batch.metrics.append(_point(f"eval/{name}", bits, event.at, event.step))
        elif isinstance(event, Warned):
            batch.tags["elastictrain.last_warning"] = cut(redact(f"{event.topic}: {event.message}"))
        elif isinstance(event, RunEnded):
            batch.metrics += self._ledger_points(event.at)
            batch.tags["elastictrain.status"] = event.status
            batch.status, batch.ended_at_ms = MLFLOW_STATUS[event.status], _ms(event.at)
            last = self.family.members.get(self._last)
            if event.status == "complete" and last is not None and last.written.step == event.step:
                batch.finished = Finished(self._run, redact(last.written.uri))

    def _recovery_points(self, event: Recovered) -> Iterator[Point]:
        for failure in self._open_failures:
            if failure.generation < event.generation:
                yield _point("ft/recovery_s", event.at - failure.at, event.at, failure.step)
        self._open_failures = [f for f in self._open_failures if f.generation >= event.generation]
        yield _point("ft/lost_steps", event.lost_steps, event.at, event.first_step)
        yield from self._ledger_points(event.at)

    def _ledger_points(self, at: float) -> Iterator[Point]:
        """The ledger so far: each bucket that is used, in seconds of the run."""
        ledger = self._ledger.goodput()
        yield _point("goodput/ratio", ledger.ratio, at, self._step)
        for bucket, seconds in ledger.seconds.items():
            if seconds:
                yield _point(f"goodput/{bucket}_s", seconds, at, self._step)
        if (cost := cost_of(self._price, ledger)) is not None:
            yield _point("cost/total", cost, at, self._step)


def _plan_tags(event: LayoutChosen) -> Iterator[tuple[str, str]]:
    yield "layout", str(Layout.from_json(event.layout))
    yield "why", event.why
    yield "runner_up", event.runner_up
    yield "memory_bytes", "" if event.memory_bytes is None else str(event.memory_bytes)
    yield "step_s", "" if event.step_s is None else repr(event.step_s)


def _checkpoint_tags(kin: Kin) -> dict[str, str]:
    event, evaluated = kin.written, kin.evaluated
    tags = {
        "step": str(event.step),
        "uri": redact(event.uri),
        "sha256": event.sha256,
        "bytes": str(event.num_bytes),
        "samples": str(event.samples),
        "sample_chain": event.sample_chain,
        "loss": repr(event.loss),
        "layout": json.dumps(event.layout),
        "parent": redact(kin.parent),
        "attempt": str(kin.attempt),
        "generation": str(kin.generation),
        "removed": _yes(kin.removed),
        "rejected": redact(kin.rejected),
    }
    if evaluated is not None:
        tags["evaluation_loss"] = repr(evaluated.loss)
        if evaluated.bits_per_byte is not None:
            tags["bits_per_byte"] = repr(evaluated.bits_per_byte)
    return tags


def _yes(answer: bool) -> str:
    return "true" if answer else "false"


def cut(text: str) -> str:
    """Short enough for a tag or param of any store."""
    return text if len(text) <= MAX_VALUE_LENGTH else text[: MAX_VALUE_LENGTH - 1] + "…"


def _step_points(event: StepCommitted) -> Iterator[Point]:
    step_s = event.finished_at - event.begun_at
    values = {
        "train/loss": event.loss,
        "train/grad_norm": event.grad_norm,
        "train/learning_rate": event.learning_rate,
        "perf/step_s": step_s,
        "data/wait_s": event.data_wait_s,
        "snapshot/stall_s": event.snapshot_stall_s,
    }
    if seconds := productive_s(event):
        values["perf/tokens_per_s"] = event.num_tokens / seconds
    values |= {f"model/{name}": value for name, value in event.gauges.items()}
    for name, value in values.items():
        yield _point(name, value, event.at, event.step)


def _node_points(event: NodesMeasured) -> Iterator[Point]:
    """Under the names by which MLflow shows a node's system metrics."""
    for load in event.nodes:
        name = f"system/{_NOT_IN_A_NAME.sub('-', load.node)}"
        yield _point(f"{name}/cpu_utilization_percentage", 100 * load.cpu_share, event.at, event.step)
        yield _point(f"{name}/system_memory_usage_megabytes", load.memory_used_bytes / 1e6, event.at, event.step)
        share = load.memory_used_bytes / max(load.memory_bytes, 1)
        yield _point(f"{name}/system_memory_usage_percentage", 100 * share, event.at, event.step)
        if load.energy_j is not None:
            yield _point(f"{name}/energy_joules", load.energy_j, event.at, event.step)
    if event.rank_memory_bytes:
        fullest = max(event.rank_memory_bytes)
        yield _point("system/fullest_rank_memory_megabytes", fullest / 1e6, event.at, event.step)


def _point(name: str, value: float, at: float, step: int) -> Point:
    return name, float(value), _ms(at), step


def _ms(at: float) -> int:
    return int(at * 1000)


def _param(value: Any) -> str:
    return cut(value if isinstance(value, str) else json.dumps(value))
