"""What happened: the one vocabulary that control, runtime and tracking share.

An event is a frozen dataclass with `at`, the unix time in seconds of the fact itself (not of its telling). The run's
journal is these events as JSON lines; every report is a fold over them. `encode` and `decode` are each other's inverse;
`decode` checks the type of every field and skips those it does not know, so an older program reads a newer journal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, TypeAlias

from pydantic import TypeAdapter, ValidationError

Continuation = Literal["bit_exact", "order_exact"]
"""How the losses go on after a recovery: the same bits (same layout), or the same samples in another sum order.

A smaller micro-batch is `order_exact` too; where the model has dropout, it draws other masks from then on, and experts
have room for the tokens of a smaller group.
"""

Source = Literal["memory", "durable", "fresh"]
"""Where a generation's state came from: keepers' memory, a durable checkpoint, or the initialisation."""

RunStatus = Literal["running", "complete", "stopped", "failed"]

DRIVER_LOST = "driver_lost"
"""Kind of the failure that the next attempt tells of: nobody else lived to."""

SkipReason = Literal["loss", "gradient", "spike"]
"""A loss that is NaN or infinite, a gradient that is, or a loss far above those before."""


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a worker or a run failed, as near to the truth as can be known."""

    kind: str
    """signal, exit, exception, bad_loss, node_lost, hang, oom, engine, storage, corrupted, unknown"""
    message: str
    """One line: 'SIGKILL', 'exit code 1', 'ValueError: ...'."""
    traceback: str = ""
    """The first failing rank's own traceback, where there is one."""
    error_type: str = ""
    """Class name of the exception, for telling a returning bug from bad luck."""


@dataclass(frozen=True, slots=True)
class Member:
    """One rank of a generation."""

    rank: int
    worker: str
    pid: int
    node: str


@dataclass(frozen=True, slots=True)
class RunStarted:
    """An attempt at the run began; the first one is the run's start."""

    at: float
    run: str
    attempt: int
    config: dict[str, Any]
    environment: dict[str, str]
    """python, torch, ray, deepspeed, host, pid, git_commit, ..."""


@dataclass(frozen=True, slots=True)
class DataReady:
    """The token shards are there and checked."""

    at: float
    uri: str
    sha256: str
    num_samples: int
    num_validation_samples: int
    seconds: float
    reused: bool


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    """A worker process is up and warm."""

    at: float
    worker: str
    node: str
    pid: int
    seconds: float
    """From asking Ray for it to ready."""


@dataclass(frozen=True, slots=True)
class SlotsHeld:
    """The run reserves another number of slots than before, those of dead workers that wait for another among them."""

    at: float
    slots: int


@dataclass(frozen=True, slots=True)
class GenerationStarted:
    """A group of ranks was formed, restored and set going."""

    at: float
    index: int
    layout: dict[str, Any]
    world_size: int
    first_step: int
    """The first step that this generation takes; state is that after first_step - 1 steps."""
    cause: str
    """start, resume, or the failure, preemption notice or resize that led to it."""
    source: Source
    continuation: Continuation
    members: tuple[Member, ...]
    phases_s: dict[str, float] = field(default_factory=dict)
    """Seconds of fence, place, rendezvous, engine, restore."""


@dataclass(frozen=True, slots=True)
class LayoutChosen:
    """A generation trains under another layout than the one before it in this attempt, if there was one."""

    at: float
    generation: int
    layout: dict[str, Any]
    why: str
    runner_up: str
    """The next best layout, and why it is not the best; empty where there was no choice."""
    memory_bytes: int | None
    """That a rank is estimated to need at most; None where that can't be told."""
    step_s: float | None
    """Seconds that a step is estimated to take."""


@dataclass(frozen=True, slots=True)
class Skip:
    """A step that used its samples up and left the weights alone, or put older ones back."""

    reason: SkipReason
    limit: float | None
    """The highest loss that would have been no spike (reason spike)."""
    first_step: int
    """The state after the step is that after first_step - 1: first_step is the step itself, or after a roll-back to a
    checkpoint the one after that checkpoint's."""


@dataclass(frozen=True, slots=True)
class Waits:
    """Seconds of a step that a rank did nothing for it, as the mean over the ranks."""

    data_s: float
    """For its batches."""
    peers_s: float
    """For other ranks, in collectives: the transfers themselves, and whoever is slower."""
    snapshot_s: float
    """For a snapshot's copy or its replicas."""


@dataclass(frozen=True, slots=True)
class StepCommitted:
    """All shards of the state after this step are in keepers' memory (and at the buddies)."""

    at: float
    generation: int
    step: int
    loss: float
    """Mean over the global batch, summed in global micro-batch order."""
    sample_chain: str
    """sha256(previous chain + sample ids of this step in order), hex: the digest of all samples so far."""
    num_samples: int
    num_tokens: int
    begun_at: float
    """When the first rank began the step."""
    finished_at: float
    """When the last rank had updated its weights."""
    learning_rate: float
    grad_norm: float
    data_wait_s: float
    """Longest wait of any rank for its batches."""
    snapshot_stall_s: float
    """Longest time that any rank's training thread waited for a snapshot's copy or its replicas."""
    skipped: Skip | None = None
    """None for a step whose update was made."""
    waits: Waits | None = None
    """None in journals of versions that told only of the longest waits."""
    gauges: Mapping[str, float] = field(default_factory=dict)
    """What else the workload tells of the step, as means over its micro-batches: how even the experts were."""


@dataclass(frozen=True, slots=True)
class RanksTimed:
    """How long the ranks of a generation worked in some consecutive steps; see `runtime.pace` for how many."""

    at: float
    """When the last of the steps was done."""
    begun_at: float
    """When the first of them began."""
    generation: int
    first_step: int
    last_step: int
    own_s: tuple[float, ...]
    """By rank: mean seconds of its own work in a step, without waiting for peers, data and snapshots."""


@dataclass(frozen=True, slots=True)
class NodeLoad:
    """How busy one node is."""

    node: str
    cpu_share: float
    """Of all its processors, 0 to 1, since it was asked last."""
    memory_used_bytes: int
    memory_bytes: int
    energy_j: float | None = None
    """Used by its processors and GPUs since it was asked last, in joules; None where nothing tells it."""


@dataclass(frozen=True, slots=True)
class NodesMeasured:
    """How busy the nodes of the run are, and how full its ranks."""

    at: float
    step: int
    nodes: tuple[NodeLoad, ...]
    rank_memory_bytes: tuple[int, ...] = ()
    """In use on the device of each rank; empty while a group forms."""


@dataclass(frozen=True, slots=True)
class FaultInjected:
    """A planned fault is about to strike."""

    at: float
    index: int
    """Position in config.faults."""
    step: int
    rank: int
    kind: str


@dataclass(frozen=True, slots=True)
class FailureDetected:
    """A member of the running generation is lost, or its code raised."""

    at: float
    """When the fault happened, as near as the keeper or the rank could tell."""
    detected_at: float
    """When the supervisor knew."""
    generation: int
    kind: str
    """worker_lost, node_lost, keeper_lost, driver_lost, hang, user_error, engine_error, corrupted, or oom: its
    allocation failed"""
    ranks: tuple[int, ...]
    node: str
    pid: int
    cause: Cause
    step: int
    """The step in flight on the lost rank."""


@dataclass(frozen=True, slots=True)
class StragglerFound:
    """A rank's own work takes much longer than its peers'; without waiting for peers, data and snapshots."""

    at: float
    generation: int
    step: int
    rank: int
    worker: str
    node: str
    own_s: float
    """Median seconds of its own work in a step, over the last steps."""
    others_s: float
    """The same of its peers."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """The first step of the generation after a failure is done."""

    at: float
    generation: int
    """The new generation."""
    first_step: int
    lost_steps: int
    """Steps that some rank had finished and that had to be done again; the half step in flight is not counted."""
    source: Source
    continuation: Continuation


@dataclass(frozen=True, slots=True)
class CheckpointWritten:
    """A durable checkpoint is complete: all shards and, last, its manifest."""

    at: float
    step: int
    uri: str
    num_bytes: int
    sha256: str
    """Of the manifest, which holds those of the shards."""
    seconds: float
    """That the write took, beside the training."""
    samples: int
    """The cursor: samples consumed."""
    sample_chain: str
    loss: float
    layout: dict[str, Any]
    origin: str = ""
    """URI of the checkpoint of another run that this is a copy of; "" for one that the run has made itself."""


@dataclass(frozen=True, slots=True)
class CheckpointFailed:
    """A durable checkpoint could not be written; training goes on."""

    at: float
    step: int
    problem: str


@dataclass(frozen=True, slots=True)
class CheckpointRejected:
    """A stored checkpoint did not verify and was not loaded."""

    at: float
    step: int
    uri: str
    problem: str


@dataclass(frozen=True, slots=True)
class CheckpointRemoved:
    """A checkpoint beyond keep_last was deleted."""

    at: float
    step: int
    uri: str


@dataclass(frozen=True, slots=True)
class Warned:
    """Something the user should know, that does not stop training."""

    at: float
    topic: str
    message: str


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The finished model on what was held out; where that is no text, only the loss says anything."""

    at: float
    step: int
    loss: float
    """Nats per token, or the mean of what the workload's loss is."""
    bits_per_byte: float | None
    gzip_bits_per_byte: float | None
    """gzip -9 on the same held-out text."""
    num_bytes: int
    sample: str
    """Text that the model wrote."""


@dataclass(frozen=True, slots=True)
class RunEnded:
    """This attempt ended."""

    at: float
    status: RunStatus
    step: int
    cause: Cause | None = None


Event: TypeAlias = (
    RunStarted
    | DataReady
    | WorkerStarted
    | SlotsHeld
    | GenerationStarted
    | LayoutChosen
    | StepCommitted
    | RanksTimed
    | NodesMeasured
    | FaultInjected
    | FailureDetected
    | StragglerFound
    | Recovered
    | CheckpointWritten
    | CheckpointFailed
    | CheckpointRejected
    | CheckpointRemoved
    | Warned
    | Evaluated
    | RunEnded
)

_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        RunStarted,
        DataReady,
        WorkerStarted,
        SlotsHeld,
        GenerationStarted,
        LayoutChosen,
        StepCommitted,
        RanksTimed,
        NodesMeasured,
        FaultInjected,
        FailureDetected,
        StragglerFound,
        Recovered,
        CheckpointWritten,
        CheckpointFailed,
        CheckpointRejected,
        CheckpointRemoved,
        Warned,
        Evaluated,
        RunEnded,
    )
}


def encode(event: Event) -> dict[str, Any]:
    """The event as JSON-able data, its type under `event`."""
    return {"event": type(event).__name__, **_plain(event)}


def decode(data: dict[str, Any]) -> Event | None:
    """The event in this data; None for a type that this version does not know.

    A float may be spelled NaN, Infinity or -Infinity. Raises ValueError naming the fields that are missing or wrong.
    """
    kind = data.get("event") if isinstance(data, dict) else None
    if not isinstance(kind, str):
        raise ValueError("not an event")
    if kind not in _KINDS:
        return None
    try:
        event: Event = _schema(kind).validate_python(data)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"not a {kind}: {wrong}") from None
    return event


@cache
def _schema(kind: str) -> TypeAdapter[Any]:
    return TypeAdapter(_KINDS[kind])


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value
