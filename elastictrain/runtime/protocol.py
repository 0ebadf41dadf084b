"""What supervisor, keepers and workers say to each other. Plain frozen data; big things travel once, by reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from elastictrain.checkpoint.source import LocatedShard
from elastictrain.checkpoint.vault import StoredShard
from elastictrain.config import Fault
from elastictrain.control.loss_guard import Seen
from elastictrain.control.vocabulary import RestorePoint
from elastictrain.events import Cause, Skip, Source
from elastictrain.plan.layout import Layout
from elastictrain.runtime.board import Progress
from elastictrain.runtime.causes import Failure
from elastictrain.runtime.preflight import Preflight
from elastictrain.state.manifest import ShardEntry
from elastictrain.state.tensors import LogicalTensor, ShardHeader


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one rank tells of one step: enough to put the step's story together from all ranks'."""

    step: int
    micro_batches: tuple[tuple[int, float, tuple[int, ...]], ...]
    """(global index, loss, sample ids) of each of this rank's micro-batches; none where another rank tells of them."""
    num_tokens: int
    begun_at: float
    finished_at: float
    learning_rate: float
    grad_norm: float
    data_wait_s: float
    snapshot_stall_s: float
    blocked_s: float = 0.0
    """Time spent waiting for peers in collectives."""
    skipped: Skip | None = None
    gauges: Mapping[str, float] = field(default_factory=dict)
    """What else its micro-batches showed, as means over them."""

    @property
    def own_s(self) -> float:
        """The rank's own work: the step without waiting for peers, for data and for snapshots."""
        return self.finished_at - self.begun_at - self.blocked_s - self.data_wait_s - self.snapshot_stall_s


def pack_records(records: list[StepRecord]) -> str:
    """Records as JSON text, to travel with a shard."""
    return json.dumps([asdict(r) for r in records])


def unpack_records(note: str) -> list[StepRecord]:
    """Inverse of `pack_records`."""
    return [_record(row) for row in json.loads(note or "[]")]


def _record(row: dict[str, Any]) -> StepRecord:
    row["micro_batches"] = tuple((g, loss, tuple(ids)) for g, loss, ids in row["micro_batches"])
    row["skipped"] = Skip(**row["skipped"]) if row["skipped"] else None
    return StepRecord(**row)


# ---------------------------------------------------------------------------------------------- keeper -> supervisor


@dataclass(frozen=True, slots=True)
class SnapshotHeld:
    """One rank's snapshot is in this keeper's memory, and at its buddy when `replicated`."""

    header: ShardHeader
    replicated: bool


@dataclass(frozen=True, slots=True)
class WorkerExited:
    """A worker process on this node ended."""

    worker: str
    at: float
    cause: Cause
    generation: int
    step: int
    phase: str


@dataclass(frozen=True, slots=True)
class LeaveAsked:
    """A worker on this node got SIGTERM."""

    worker: str
    at: float


@dataclass(frozen=True, slots=True)
class FaultAnnounced:
    """A planned fault is about to strike a worker on this node."""

    at: float
    index: int
    step: int
    rank: int


@dataclass(frozen=True, slots=True)
class KeeperTrouble:
    """Something that the user should know, such as a buddy that can't be reached."""

    topic: str
    message: str


@dataclass(frozen=True, slots=True)
class Answered:
    """What a worker said to a question that this keeper relayed."""

    ticket: int
    """Of the question, to this worker."""
    value: Any = None
    failure: Failure | None = None


KeeperEvent: TypeAlias = SnapshotHeld | WorkerExited | LeaveAsked | FaultAnnounced | KeeperTrouble | Answered


@dataclass(frozen=True, slots=True)
class KeeperInfo:
    """A keeper that is up."""

    node: str
    pid: int
    replica_address: tuple[str, int]
    preflight: Preflight


@dataclass(frozen=True, slots=True)
class KeeperTerms:
    """What a keeper is told by the driver that it serves."""

    token: bytes = field(repr=False)
    """Authenticates keepers and workers of one attempt to each other; it is in no log and in no storage."""
    durable_every: int
    """Steps between durable checkpoints."""
    orphan_timeout_s: float
    offload_path: str | None = None


@dataclass(frozen=True, slots=True)
class Greeting:
    """A keeper of an earlier driver."""

    version: str
    """Of elastictrain."""
    silent_s: float
    """Since it heard of a driver."""
    newest_generation: int
    """That it knows of."""


@dataclass(frozen=True, slots=True)
class Bequest:
    """What a keeper has of an earlier driver's time."""

    node: str
    ray_id: str
    """Ray's id of its node."""
    replica_address: tuple[str, int]
    held: tuple[StoredShard, ...]
    """Verified snapshots."""
    untold: tuple[ShardHeader, ...]
    """Of snapshots, also gone ones, of steps that may not be on record."""
    events: tuple[tuple[int, KeeperEvent], ...]
    """Numbered, those that the driver may not have heard."""
    trusted: Mapping[int, int]
    """The last step of a generation that may be used, for those in which memory was corrupted."""
    tensors: tuple[LogicalTensor, ...]
    """All of the state's; empty where no group was ever formed."""


@dataclass(frozen=True, slots=True)
class FenceReply:
    """What a keeper has once it refuses all older generations."""

    held: tuple[StoredShard, ...]
    """Verified snapshots."""
    events: tuple[tuple[int, KeeperEvent], ...]
    """Numbered events that the supervisor has not seen."""
    progress: Mapping[str, Progress]
    """Where each worker of the node was."""


@dataclass(frozen=True, slots=True)
class SaveReply:
    """Shards that a keeper has written to storage."""

    entries: tuple[ShardEntry, ...]


# ---------------------------------------------------------------------------------------------- supervisor <-> worker


@dataclass(frozen=True, slots=True)
class Question:
    """What several workers are asked for at once: a method of theirs, and the arguments that are the same for all."""

    method: str
    common: tuple[Any, ...] = ()
    together: bool = False
    """No answer is of use before the others, but for a failure."""
    again: bool = False
    """May be asked twice."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker that is warm."""

    worker: str
    pid: int
    node: str
    rendezvous: str
    """host:port of its store, for the generations in which it is rank 0."""
    said: str = ""
    """What its user should know; mostly nothing."""


@dataclass(frozen=True, slots=True)
class RestoreFrom:
    """Where a generation's state comes from."""

    source: Source
    step: int
    shards: tuple[LocatedShard, ...] = ()
    """By rank of the generation that made them (source memory)."""

    @property
    def point(self) -> RestorePoint:
        """For the state machine."""
        return RestorePoint(self.source, self.step)


@dataclass(frozen=True, slots=True)
class FormOrder:
    """A new generation, as its ranks are told of it."""

    generation: int
    layout: Layout
    rendezvous: str
    faults: tuple[tuple[int, Fault], ...]
    snapshot_every: int
    """Steps between snapshots, to begin with."""
    seen: tuple[Seen, ...]
    """What is recorded of the last steps before the first of this generation."""


@dataclass(frozen=True, slots=True)
class FormReply:
    """A rank has its group, engine and state."""

    seconds: dict[str, float]
    """rendezvous, engine, restore"""
    tensors: tuple[LogicalTensor, ...]
    """All of the state's, from rank 0; empty from others."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a rank's training in one generation ended."""

    kind: Literal["finished", "paused", "aborted", "peers_broken", "raised", "corrupted"]
    step: int
    """The last step done, or the one in which it broke."""
    at: float
    cause: Cause | None = None
    guilty: tuple[int, ...] = ()
    """Ranks whose memory changed (kind corrupted); empty when it can't be told."""
    trusted_step: int = 0
    """The newest step whose state can be trusted (kind corrupted)."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The finished model on what was held out; all but the loss is of text."""

    loss: float
    bits_per_byte: float | None = None
    gzip_bits_per_byte: float | None = None
    num_bytes: int = 0
    sample: str = ""
