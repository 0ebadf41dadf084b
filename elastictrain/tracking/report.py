"""The report of a run, folded from its events (pure): one JSON-able dict whose shape is versioned.

docs/report.md documents every field with its unit; a test holds the two together. Floats are kept in full; losses may
be NaN or infinite, so write the dict with `exact_json.dumps`. O(events) of time; with events in an `EventLog`, 350
bytes a step in all.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import median
from typing import Any

from elastictrain.events import (
    DRIVER_LOST,
    Cause,
    CheckpointFailed,
    CheckpointRejected,
    CheckpointRemoved,
    CheckpointWritten,
    DataReady,
    Evaluated,
    Event,
    FailureDetected,
    FaultInjected,
    GenerationStarted,
    LayoutChosen,
    NodesMeasured,
    RanksTimed,
    Recovered,
    RunStarted,
    StragglerFound,
    Warned,
)
from elastictrain.tracking.attempts import Attempt, split_attempts
from elastictrain.tracking.committed import committed_steps
from elastictrain.tracking.cost import cost_of, price_of
from elastictrain.tracking.event_log import View
from elastictrain.tracking.ledger import Goodput, of_attempts, stalls, total
from elastictrain.tracking.redact import redact, redact_all
from elastictrain.tracking.step_times import StepTime, times
from elastictrain.tracking.timeline import PARTS, Spread, timeline
from elastictrain.tracking.trained import Trained

REPORT_VERSION = 1
"""Grows when a field changes its meaning or goes away; new fields alone do not change it."""


def build_report(events: Sequence[Event], now: float | None = None, delivered: bool = False) -> dict[str, Any]:
    """The report of these events, in journal order; `delivered` says that MLflow has taken all of them.

    `now` is for a run that a process is still working on, and makes its status `running`; without it a run whose last
    attempt has no end is `interrupted`. Raises ValueError when the events hold no start of a run.
    """
    attempts = split_attempts(events, now)
    if not attempts:
        raise ValueError("the events hold no RunStarted: there is no run to report")
    told = View(events, array("q", chain.from_iterable(attempt.events.places for attempt in attempts)))
    run = [e for attempt in attempts for e in attempt.others]
    begun_at = attempts[0].begun_at
    latest = next(e for e in reversed(run) if isinstance(e, RunStarted))
    ending = attempts[-1].ending
    status = ending.status if ending else "interrupted" if now is None else "running"
    steps = committed_steps(told)
    failures = [f for attempt in attempts for f in _failures(attempt, begun_at)]
    healed = [f for f in failures if f["recovered_s"] is not None and f["kind"] != DRIVER_LOST]  # not by itself
    recoveries_s = [f["recovered_s"] for f in healed]
    parts = of_attempts(attempts, steps, run, PARTS)
    ledger = total(parts)
    measured = [e for e in run if isinstance(e, NodesMeasured)]
    spread = Spread(begun_at, sum(part.wall_s for part in parts), PARTS)
    trained = Trained(steps.standing, begun_at, spread, measured[-1].step if measured else 0)
    last, saved = trained.last, {e.step for e in run if isinstance(e, CheckpointWritten)}
    return {
        "version": REPORT_VERSION,
        "run": latest.run,
        "status": status,
        "steps": last.step if last else 0,
        "samples": trained.samples,
        "loss": trained.loss,
        "gauges": trained.gauges,
        "sample_digest": last.sample_chain if last else "",
        "generations": [g for attempt in attempts for g in _generations(attempt, begun_at)],
        "layouts": [
            {
                "generation": e.generation,
                "layout": e.layout,
                "why": e.why,
                "runner_up": e.runner_up,
                "memory_bytes": e.memory_bytes,
                "step_s": e.step_s,
                "at_s": e.at - begun_at,
            }
            for e in run
            if isinstance(e, LayoutChosen)
        ],
        "failures": failures,
        "skipped_steps": trained.skipped,
        "lost_steps": _lost_steps(attempts),
        "median_recovery_s": median(recoveries_s) if recoveries_s else None,
        "goodput": {**ledger.seconds, "wall_s": ledger.wall_s, "ratio": ledger.ratio},
        "worker_seconds": {**ledger.worker_seconds, "total": sum(ledger.workers_us.values()) / 1e6},
        "cost": _cost(latest.config, ledger, trained.tokens),
        "energy": _energy(measured, trained.measured_tokens),
        "timeline": timeline(parts, spread.tokens),
        "rank_times": [
            {
                "generation": e.generation,
                "first_step": e.first_step,
                "last_step": e.last_step,
                "own_s": list(e.own_s),
                "begun_s": e.begun_at - begun_at,
                "at_s": e.at - begun_at,
            }
            for e in run
            if isinstance(e, RanksTimed)
        ],
        "rank_memory": [
            {"step": e.step, "bytes": list(e.rank_memory_bytes), "at_s": e.at - begun_at}
            for e in measured
            if e.rank_memory_bytes
        ],
        "checkpoints": _checkpoints(run, stalls(told, saved), begun_at),
        "throughput": _throughput(trained, ledger),
        "evaluation": _evaluation(run, begun_at),
        "data": _data(run),
        "warnings": _warnings(run, begun_at, delivered),
        "faults_injected": [
            {"index": e.index, "step": e.step, "rank": e.rank, "kind": e.kind, "at_s": e.at - begun_at}
            for e in run
            if isinstance(e, FaultInjected)
        ],
        "stragglers": [
            {
                "step": e.step,
                "generation": e.generation,
                "rank": e.rank,
                "node": e.node,
                "own_s": e.own_s,
                "others_s": e.others_s,
                "at_s": e.at - begun_at,
            }
            for e in run
            if isinstance(e, StragglerFound)
        ],
        "rejected_checkpoints": [
            {"step": e.step, "uri": redact(e.uri), "problem": redact(e.problem), "at_s": e.at - begun_at}
            for e in run
            if isinstance(e, CheckpointRejected)
        ],
        "attempts": [_attempt(attempt, begun_at) for attempt in attempts],
        "config": redact_all(latest.config),
        "environment": redact_all(latest.environment),
        "started_at": begun_at,
        "wall_s": ledger.wall_s,
    }


def _cause(cause: Cause) -> dict[str, Any]:
    return {"kind": cause.kind, "message": redact(cause.message), "traceback": redact(cause.traceback)}


def _attempt(attempt: Attempt, begun_at: float) -> dict[str, Any]:
    start, ending = attempt.events[0], attempt.ending
    assert isinstance(start, RunStarted)
    return {
        "attempt": start.attempt,
        "status": ending.status if ending else None,
        "started_s": start.at - begun_at,
        "ended_s": attempt.ended_at - begun_at if ending else None,
        "seen_s": attempt.ended_at - begun_at,
        "cause": _cause(ending.cause) if ending and ending.cause else None,
    }


def _generations(attempt: Attempt, begun_at: float) -> list[dict[str, Any]]:
    start = attempt.events[0]
    assert isinstance(start, RunStarted)
    return [
        {
            "index": e.index,
            "attempt": start.attempt,
            "world_size": e.world_size,
            "layout": e.layout,
            "first_step": e.first_step,
            "cause": e.cause,
            "source": e.source,
            "continuation": e.continuation,
            "at_s": e.at - begun_at,
            "phases_s": e.phases_s,
            "members": [{"rank": m.rank, "worker": m.worker, "pid": m.pid, "node": m.node} for m in e.members],
        }
        for e in attempt.others
        if isinstance(e, GenerationStarted)
    ]


def _failures(attempt: Attempt, begun_at: float) -> list[dict[str, Any]]:
    """One entry a failure; a recovery closes every failure of an earlier generation that is still open."""
    found: list[tuple[FailureDetected, dict[str, Any]]] = []
    planned = [e for e in attempt.others if isinstance(e, FaultInjected)]  # some are told after what they did
    for event in attempt.others:
        if isinstance(event, FailureDetected):
            fault = next((p for p in planned if p.step == event.step and p.rank in event.ranks), None)
            if fault:
                planned.remove(fault)
            found.append((event, _failure(event, begun_at, injected=fault is not None)))
        elif isinstance(event, Recovered):
            for failure, entry in found:
                if failure.generation < event.generation and entry["recovered_s"] is None:
                    entry["recovered_s"] = event.at - failure.at
                    entry["lost_steps"] = event.lost_steps
                    entry["source"] = event.source
                    entry["continuation"] = event.continuation
    return [entry for _, entry in found]


def _failure(event: FailureDetected, begun_at: float, injected: bool) -> dict[str, Any]:
    return {
        "kind": event.kind,
        "cause": _cause(event.cause),
        "injected": injected,
        "generation": event.generation,
        "ranks": list(event.ranks),
        "node": event.node,
        "pid": event.pid,
        "step": event.step,
        "at_s": event.at - begun_at,
        "detected_s": event.detected_at - event.at,
        "recovered_s": None,
        "lost_steps": None,
        "source": None,
        "continuation": None,
    }


def _lost_steps(attempts: Sequence[Attempt]) -> int:
    """Steps done again: each recovery's own count, and the committed ones that a resume went back behind."""
    lost = 0
    last_step = 0
    for attempt in attempts:
        resuming, driver_lost, undone = True, False, 0
        for event in times(attempt.events):
            if isinstance(event, FailureDetected) and event.kind == DRIVER_LOST:
                driver_lost = True
            elif isinstance(event, GenerationStarted):
                undone = max(last_step - event.first_step + 1, 0) if resuming else undone
                lost += undone if resuming else 0
                last_step, resuming = event.first_step - 1, False
            elif isinstance(event, StepTime):
                last_step = event.step
            elif isinstance(event, Recovered):
                lost += max(event.lost_steps - undone, 0) if driver_lost else event.lost_steps
                driver_lost = False
    return lost


def _checkpoints(events: Sequence[Event], stall_s: Mapping[int, float], begun_at: float) -> list[dict[str, Any]]:
    written: dict[str, dict[str, Any]] = {}
    for event in events:
        if isinstance(event, CheckpointWritten):
            written.pop(event.uri, None)
            written[event.uri] = {
                "step": event.step,
                "uri": redact(event.uri),
                "bytes": event.num_bytes,
                "sha256": event.sha256,
                "stall_s": stall_s.get(event.step, 0.0),
                "seconds": event.seconds,
                "samples": event.samples,
                "loss": event.loss,
                "at_s": event.at - begun_at,
                "removed": False,
            }
        elif isinstance(event, CheckpointRemoved) and event.uri in written:
            written[event.uri]["removed"] = True
    return list(written.values())


def _cost(config: dict[str, Any], ledger: Goodput, tokens: int) -> dict[str, Any] | None:
    """See `cost_of`; None without a price."""
    price = price_of(config)
    spent = cost_of(price, ledger)
    if spent is None:
        return None
    return {
        "worker_cost_per_hour": price,
        "total": spent,
        "per_million_tokens": spent / tokens * 1e6 if tokens else None,
    }


def _energy(measured: Sequence[NodesMeasured], tokens: int) -> dict[str, Any] | None:
    """What the nodes' processors and GPUs used until they were last asked; None where no node can tell."""
    told = [load.energy_j for e in measured for load in e.nodes if load.energy_j is not None]
    if not told:
        return None
    return {
        "joules": sum(told),
        "nodes_that_tell": len({load.node for e in measured for load in e.nodes if load.energy_j is not None}),
        "nodes": len({load.node for e in measured for load in e.nodes}),
        "joules_per_million_tokens": sum(told) / tokens * 1e6 if tokens else None,
    }


def _throughput(trained: Trained, ledger: Goodput) -> dict[str, float]:
    busy_s, wall_s = ledger.productive_s, ledger.wall_s
    return {
        "tokens_per_s": trained.tokens / busy_s if busy_s else 0.0,
        "samples_per_s": trained.samples / busy_s if busy_s else 0.0,
        "steps_per_s": len(trained.loss) / busy_s if busy_s else 0.0,
        "tokens_per_s_wall": trained.tokens / wall_s if wall_s else 0.0,
    }


def _evaluation(events: Sequence[Event], begun_at: float) -> dict[str, Any] | None:
    event = next((e for e in reversed(events) if isinstance(e, Evaluated)), None)
    if event is None:
        return None
    return {
        "step": event.step,
        "loss": event.loss,
        "bits_per_byte": event.bits_per_byte,
        "gzip_bits_per_byte": event.gzip_bits_per_byte,
        "bytes": event.num_bytes,
        "sample": event.sample,
        "at_s": event.at - begun_at,
    }


def _data(events: Sequence[Event]) -> dict[str, Any] | None:
    event = next((e for e in reversed(events) if isinstance(e, DataReady)), None)
    if event is None:
        return None
    return {
        "uri": redact(event.uri),
        "sha256": event.sha256,
        "num_samples": event.num_samples,
        "num_validation_samples": event.num_validation_samples,
        "seconds": event.seconds,
        "reused": event.reused,
    }


def _warnings(events: Sequence[Event], begun_at: float, delivered: bool) -> list[dict[str, Any]]:
    """What was warned of, checkpoints that could not be written among it; not what MLflow has taken after all."""
    warnings = []
    for event in events:
        if isinstance(event, Warned) and not (delivered and event.topic == "tracking"):
            warnings.append((event.topic, event.message, event.at))
        elif isinstance(event, CheckpointFailed):
            warnings.append(("checkpoint", f"step {event.step}: {event.problem}", event.at))
    return [{"topic": topic, "message": redact(message), "at_s": at - begun_at} for topic, message, at in warnings]
