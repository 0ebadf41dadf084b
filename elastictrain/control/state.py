"""What the state machine knows: everything that its decisions depend on, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from elastictrain.control.budget import Account, Budgets
from elastictrain.control.vocabulary import Phase, RestorePoint
from elastictrain.plan.auto import Choice, Plans


@dataclass(frozen=True, slots=True)
class Policy:
    """What the user allows; the same for the whole run."""

    steps: int
    plans: Plans
    """The one to begin with, then those to fall back on when memory runs out; all for the same world sizes."""
    standby: int
    budgets: Budgets
    replace_timeout_s: float
    wait_timeout_s: float
    unreserved_standby: bool = True
    """A standby may wait without a slot of its own (CPU clusters) and take over that of the worker it replaces."""

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """Legal ones between min_workers and max_workers, ascending, never empty."""
        return tuple(sorted(self.plans[0]))


@dataclass(frozen=True, slots=True)
class Notice:
    """Why a worker will be gone, and when."""

    cause: str
    deadline: float
    for_good: bool = False
    """Its slot goes with it: nobody replaces it."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker process."""

    node: str
    reserved: bool
    state: Literal["starting", "ready"] = "starting"
    notice: Notice | None = None
    """Once it has one it takes no rank any more."""


@dataclass(frozen=True, slots=True)
class State:
    """One moment of a run."""

    policy: Policy
    phase: Phase
    generation: int
    """The one that is forming or running, or the next one while there is none."""
    restore: RestorePoint
    """What the next generation starts from."""
    cause: str
    """Why the next generation is formed."""
    since: float
    """When this gathering began."""
    committed_step: int
    account: Account
    """Failures since the last progress."""
    rung: int = 0
    """Which of the policy's plans the next generation is formed by; the one in force while one is there."""
    nodes: Mapping[str, int] = field(default_factory=dict)
    """Slots for workers, by node."""
    workers: Mapping[str, Worker] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    """Workers of the current generation, by rank; of the last one while there is none."""
    next_worker: int = 0
    draining: frozenset[str] = frozenset()
    """Nodes that leave and have not been released; no worker starts there."""
    leaving: bool = False
    """A member was told to leave, and no group without it was formed yet."""
    losses_at: tuple[float, ...] = ()
    """When nodes were lost, lately."""
    failed_at: tuple[tuple[float, str], ...] = ()
    """When something failed there, and on which node, lately."""
    quarantined: frozenset[str] = frozenset()
    """Nodes that leave because they failed too often."""
    left_alone: bool = False
    """Nodes were quarantined and given up, and have not been taken back."""
    pause_s: float = 1.0
    """How long training stood still for the last change of the group."""
    paced_from: tuple[int, float] | None = None
    """The first step that this generation committed, and when."""
    pausing: bool = False
    """The ranks have been asked to stop after a step, for a resize."""
    restart_at: float = 0.0
    """No group is formed before this, after several failures in a row."""
    start_failures: int = 0
    """Workers that died before they were ready, since one came up or the group failed."""
    start_at: float = 0.0
    """No worker is started before this, after several that did not come up."""
    last_error: tuple[int, str] | None = None
    """Step and type of the last exception in user code, or lack of memory: the same one twice is no accident."""
    trusted: Mapping[int, int] = field(default_factory=dict)
    """The last step of a generation whose states may be used, for those in which memory was corrupted."""
    warned: frozenset[str] = frozenset()

    def choice(self, world_size: int) -> Choice:
        """The layout of so many workers, and why."""
        return self.policy.plans[self.rung][world_size]

    @property
    def ready(self) -> list[str]:
        """Workers that could hold a rank, in order of their start."""
        return [name for name, w in self.workers.items() if w.state == "ready" and w.notice is None]

    @property
    def coming(self) -> bool:
        """Whether a worker that could hold a rank is being started."""
        return any(w.state == "starting" and w.notice is None for w in self.workers.values())

    @property
    def standbys(self) -> list[str]:
        """Ready workers without a rank."""
        return [name for name in self.ready if self.phase == "gathering" or name not in self.members]

    @property
    def size(self) -> int | None:
        """The largest legal world that the ready workers can fill now."""
        available = min(len(self.ready), sum(self.nodes.values()))
        return max((n for n in self.policy.world_sizes if n <= available), default=None)

    @property
    def seated(self) -> int | None:
        """The same with no more workers on a node than it has slots: a larger world that shares processors is none."""
        there = Counter(self.workers[name].node for name in self.ready)
        available = sum(min(there[node], slots) for node, slots in self.nodes.items())
        return max((n for n in self.policy.world_sizes if n <= available), default=None)
