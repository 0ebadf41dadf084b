"""Events and numbers in words (pure): what a terminal, a log file and the summary at the end say.

One sentence per event that a person would want to know of; None for the rest, such as a committed step. The live
table and the plain lines both speak through here, so they tell the same story.
"""

from __future__ import annotations

from collections.abc import Sequence

from elastictrain.events import (
    DRIVER_LOST,
    CheckpointFailed,
    CheckpointRejected,
    CheckpointWritten,
    DataReady,
    Evaluated,
    Event,
    FailureDetected,
    FaultInjected,
    GenerationStarted,
    LayoutChosen,
    Recovered,
    RunEnded,
    RunStarted,
    Skip,
    StepCommitted,
    StragglerFound,
    Warned,
    WorkerStarted,
)
from elastictrain.plan.layout import Layout
from elastictrain.status import Status
from elastictrain.tracking.wording import bytes_text, count_text, place_text, seconds_text, skip_text, source_text


class Narrator:
    """Tells a run's events in their order; remembers when the fault behind a recovery struck."""

    def __init__(self) -> None:
        self._fault_at: float | None = None

    def tell(self, event: Event) -> str | None:
        """The event in one sentence, or None where there is nothing to tell."""
        if isinstance(event, FailureDetected) and self._fault_at is None:
            self._fault_at = event.at
        sentence = say(event, self._fault_at)
        if isinstance(event, Recovered):
            self._fault_at = None
        return sentence


def say(event: Event, fault_at: float | None = None) -> str | None:
    """The event in one sentence; a recovery's seconds count from `fault_at`."""
    match event:
        case RunStarted():
            return f"run {event.run} " + ("starts" if event.attempt == 1 else f"goes on, attempt {event.attempt}")
        case DataReady():
            how = "found unchanged" if event.reused else "prepared"
            held_out = f"{event.num_validation_samples:,} held out"
            return f"data {how} in {seconds_text(event.seconds)}: {event.num_samples:,} samples, {held_out}"
        case WorkerStarted():
            where = place_text(event.pid, event.node)
            return f"worker {event.worker} ({where}) warm after {seconds_text(event.seconds)}"
        case GenerationStarted():
            world = f"{count_text(event.world_size, 'worker')}, {Layout.from_json(event.layout)}"
            return f"{_step(event.first_step)}generation {event.index}: {world}, state {_SOURCES[event.source]}"
        case LayoutChosen():
            return f"layout {Layout.from_json(event.layout)}: {event.why}"
        case StepCommitted(skipped=Skip() as skip):
            undone = f"; back to the state after step {skip.first_step - 1}" if skip.first_step < event.step else ""
            return f"{_step(event.step)}skipped: {skip_text(skip.reason, event.loss, skip.limit)}{undone}"
        case FaultInjected():
            return f"{_step(event.step)}planned fault: {event.kind} rank {event.rank}"
        case FailureDetected() if event.kind == DRIVER_LOST:
            when = f"{seconds_text(event.detected_at - event.at)} ago"
            return f"{_step(event.step)}the last driver (pid {event.pid} on {event.node}) was lost {when}"
        case FailureDetected():
            return f"{_step(event.step)}{_failure(event)}; detected in {seconds_text(event.detected_at - event.at)}"
        case StragglerFound():
            slower = f"{event.own_s / max(event.others_s, 1e-9):.1f} times as long as its peers"
            times = f"{seconds_text(event.own_s)} against {seconds_text(event.others_s)} a step"
            return f"{_step(event.step)}rank {event.rank} (node {event.node}) is slow: it works {slower}, {times}"
        case Recovered():
            took = "" if fault_at is None else f" in {seconds_text(event.at - fault_at)}"
            lost, source = f"{count_text(event.lost_steps, 'step')} lost", source_text(event.source)
            return f"{_step(event.first_step)}recovered{took} from {source}, {lost}, {event.continuation}"
        case CheckpointWritten():
            size = bytes_text(event.num_bytes)
            if event.origin:
                return f"{_step(event.step)}begins with a copy of {event.origin}, {size}"
            return f"{_step(event.step)}checkpoint written in {seconds_text(event.seconds)}, {size}"
        case CheckpointFailed():
            return f"{_step(event.step)}checkpoint not written: {event.problem}"
        case CheckpointRejected():
            return f"checkpoint of step {event.step} refused: {event.problem} ({event.uri})"
        case Warned():
            return f"warning, {event.topic}: {event.message}"
        case Evaluated():
            if event.bits_per_byte is None:
                return f"{_step(event.step)}validation: loss {event.loss:.4f}"
            beside = f"gzip -9: {event.gzip_bits_per_byte:.3f}"
            return f"{_step(event.step)}validation: {event.bits_per_byte:.3f} bits per byte ({beside})"
        case RunEnded():
            # what the driver itself raised is told by whoever catches it
            raised = event.cause is not None and event.cause.kind == "exception" and not event.cause.traceback
            why = f": {event.cause.message}" if event.cause and not raised else ""
            return f"{_step(event.step)}run {event.status}{why}"
        case _:
            return None


def status_line(status: Status) -> str:
    """The live state in one line."""
    parts = [f"step {status.step}/{status.steps}", status.status]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    if status.tokens_per_s:
        parts.append(f"{status.tokens_per_s:,.0f} tokens/s")
    if status.world_size:
        parts.append(f"{count_text(status.world_size, 'worker')} ({status.layout})")
    parts.append(f"goodput {percent(status.goodput)}")
    if status.last_recovery_s is not None:
        parts.append(f"{count_text(status.lost_steps, 'step')} lost")
        parts.append(f"recovery {seconds_text(status.last_recovery_s)}")
    if status.message:
        parts.append(status.message)
    return "  ".join(parts)


def percent(ratio: float) -> str:
    """A ratio as a percentage."""
    return f"{100 * ratio:.1f} %"


_SOURCES = {"memory": "from memory", "durable": "from the checkpoint", "fresh": "fresh"}


def _step(step: int) -> str:
    return f"step {step}  "


def _failure(event: FailureDetected) -> str:
    if event.kind == "node_lost":
        return f"node {event.node} lost with {_ranks(event.ranks)}"
    place = place_text(event.pid, event.node)
    if event.kind == "keeper_lost":
        return f"{event.cause.message} ({place}; it served {_ranks(event.ranks)})"
    who = f"{_ranks(event.ranks)} ({place})"
    match event.cause.kind:
        case "signal":
            return f"{who} killed by {event.cause.message}"
        case "exit":
            return f"{who} ended with {event.cause.message}"
        case "hang":
            return f"{who} hangs: {event.cause.message}" if event.ranks else f"the ranks hang: {event.cause.message}"
        case "corrupted":
            return f"memory corrupted{f', {who}' if event.ranks else ''}: {event.cause.message}"
        case "exception":
            return f"{who} raised {event.cause.message}"
        case "oom" if event.kind == "oom":
            return f"{who} ran out of memory: {event.cause.message}"
        case _:
            return f"{who} lost: {event.cause.message}"


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
