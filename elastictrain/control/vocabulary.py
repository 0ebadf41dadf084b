"""What the state machine is told (observations) and what it orders (actions).

Observations are facts about the cluster, told by whoever performs the actions: the live supervisor on Ray, or a
simulator. Every action that takes time is answered by an observation (`Fenced`, `Formed` or `FormFailed`, `WorkerUp`
or `WorkerDied`), and an answer that belongs to an old generation is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from elastictrain.events import Cause, RunStatus, Source
from elastictrain.plan.auto import Choice


@dataclass(frozen=True, slots=True)
class RestorePoint:
    """A state to start a generation from: that after `step` steps."""

    source: Source
    step: int


# ------------------------------------------------------------------------------------------------ observations


@dataclass(frozen=True, slots=True)
class NodesJoined:
    """Nodes that can hold so many workers each; told again when that number changes.

    Where it falls, workers leave at the next step boundary.
    """

    slots: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class NodeLost:
    """A node is gone, with every process on it."""

    node: str
    cause: Cause


@dataclass(frozen=True, slots=True)
class NodeRefused:
    """A node that has joined is not fit for use; none of its workers was up yet, and they are gone."""

    node: str


@dataclass(frozen=True, slots=True)
class KeeperLost:
    """A node's keeper is gone, with the snapshots that it held; its workers live, and are `WorkerUp` with the next."""

    node: str
    cause: Cause


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """A worker process is warm and waits for a rank."""

    worker: str


@dataclass(frozen=True, slots=True)
class WorkerDied:
    """A worker process is gone, or never came up."""

    worker: str
    cause: Cause
    step: int = 0


@dataclass(frozen=True, slots=True)
class Leaving:
    """A worker, or a node with all of its workers, will be gone at `deadline`, and nothing has failed yet."""

    cause: str
    """'worker-1 leaves: SIGTERM'"""
    deadline: float
    """On the clock of `now`, seconds."""
    worker: str = ""
    node: str = ""


@dataclass(frozen=True, slots=True)
class RankRaised:
    """A rank's own code raised; its process lives."""

    generation: int
    worker: str
    step: int
    cause: Cause


@dataclass(frozen=True, slots=True)
class PeersBroken:
    """A rank's collective broke and nobody is known to be dead: the group can't go on."""

    generation: int
    cause: Cause


@dataclass(frozen=True, slots=True)
class StateCorrupted:
    """Memory of these workers (of nobody knows whom, if none) changed by itself; all ranks have stopped.

    Of this generation's states only those up to `trusted_step` can be used.
    """

    generation: int
    workers: tuple[str, ...]
    trusted_step: int
    cause: Cause


@dataclass(frozen=True, slots=True)
class Fenced:
    """The old generation is silent; `restore` is the best state that can be had."""

    generation: int
    restore: RestorePoint


@dataclass(frozen=True, slots=True)
class Formed:
    """The group of this generation is built, restored and training."""

    generation: int


@dataclass(frozen=True, slots=True)
class FormFailed:
    """A worker could not join its group; `worker` is None when nobody is to blame."""

    generation: int
    worker: str | None
    cause: Cause


@dataclass(frozen=True, slots=True)
class StepDone:
    """A snapshot of this step is committed: it can't be lost by one failure any more."""

    generation: int
    step: int


@dataclass(frozen=True, slots=True)
class Paused:
    """The ranks of this generation have stopped, all after the same step."""

    generation: int


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Somebody wants the run to stop, with its last state made durable."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time went by."""


Observation: TypeAlias = (
    NodesJoined
    | NodeLost
    | NodeRefused
    | KeeperLost
    | WorkerUp
    | WorkerDied
    | Leaving
    | RankRaised
    | PeersBroken
    | StateCorrupted
    | Fenced
    | Formed
    | FormFailed
    | StepDone
    | Paused
    | StopAsked
    | Tick
)

# ------------------------------------------------------------------------------------------------ actions


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start a worker process; `reserved` says whether it holds a slot of its node from the start."""

    worker: str
    node: str
    reserved: bool


@dataclass(frozen=True, slots=True)
class StopWorker:
    """End a worker process that is of no more use."""

    worker: str


@dataclass(frozen=True, slots=True)
class Fence:
    """Make sure that nothing below this generation writes; quiet its survivors; then find the best state."""

    generation: int
    survivors: tuple[str, ...]
    trusted: Mapping[int, int] = field(default_factory=dict)
    """The last step of a generation whose states may be used, for those in which memory was corrupted."""


@dataclass(frozen=True, slots=True)
class Form:
    """Form the group (rank i is workers[i]), load the restore point and train."""

    generation: int
    workers: tuple[str, ...]
    restore: RestorePoint
    cause: str
    choice: Choice
    """The layout, and why it is this one."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Let all ranks of this generation stop after the same step, so that what follows loses nothing."""

    generation: int


@dataclass(frozen=True, slots=True)
class Save:
    """Make the state that was restored last durable: who holds it in memory is about to go."""


@dataclass(frozen=True, slots=True)
class Readmit:
    """Take back nodes that are left alone: there is no room without them."""


@dataclass(frozen=True, slots=True)
class ReleaseNode:
    """Give up a node that leaves: nothing on it is needed any more."""

    node: str
    alone_s: float = 0.0
    """How long to leave it alone then, in seconds."""


@dataclass(frozen=True, slots=True)
class End:
    """End the run: save the newest state if `status` is not failed for good, and stop everything."""

    status: RunStatus
    cause: Cause | None = None


@dataclass(frozen=True, slots=True)
class Warn:
    """Tell the user something."""

    topic: str
    message: str


Action: TypeAlias = StartWorker | StopWorker | Fence | Form | Pause | Save | Readmit | ReleaseNode | End | Warn

Phase = Literal["gathering", "forming", "running", "fencing", "ended"]
