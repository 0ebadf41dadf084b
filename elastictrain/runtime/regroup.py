"""From one generation to the next: performs control's `Fence` and `Form`, one at a time, and answers each.

Here is what the two share: which state was found and where, the clock of the phases between them, and what the next
group is told. `fencing` and `forming` hold the messages.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import ray

from elastictrain.checkpoint.source import LocatedShard
from elastictrain.config import TrainConfig
from elastictrain.control import vocabulary as v
from elastictrain.control.restore import MemoryState
from elastictrain.events import Cause, Member
from elastictrain.runtime.fencing import Fencing
from elastictrain.runtime.fleet import Fleet
from elastictrain.runtime.forming import Forming
from elastictrain.runtime.protocol import Outcome, RestoreFrom
from elastictrain.runtime.replies import Replies
from elastictrain.runtime.roster import Roster
from elastictrain.runtime.saving import Saving
from elastictrain.runtime.story import Story
from elastictrain.state.tensors import ShardHeader

QUIET_TIMEOUT_S = 10.0
"""How long a survivor may take to leave its generation before it is ended."""
KEEPERS_S = 20.0
"""How long an earlier driver's keepers are waited for, which may have the only state, when the attempt ends at once."""
WAIT_S = 0.1


class Owner(Protocol):
    """Whoever is told what comes of it: the supervisor."""

    def worker_lost(self, name: str, cause: Cause) -> None:
        """A worker is lost, as far as is known."""
        ...

    def committed(self, header: ShardHeader) -> None:
        """A snapshot is held."""
        ...

    def broken(self, cause: Cause) -> None:
        """A collective broke; nobody knows yet why."""
        ...

    def training_ended(self, worker: str, generation: int, outcome: Outcome) -> None:
        """A rank trains no more."""
        ...

    def formed(self, generation: int) -> None:
        """A group is there, and on record."""
        ...

    def form_failed(self, worker: str | None, cause: Cause) -> None:
        """A group could not be formed."""
        ...

    def fenced(self, generation: int, point: v.RestorePoint) -> None:
        """Everything older is silent, and this is the state to go on from."""
        ...


class Regroup:
    """Of one attempt. `check` is called often."""

    def __init__(
        self, config: TrainConfig, roster: Roster, replies: Replies, story: Story, saving: Saving, owner: Owner
    ) -> None:
        self._config, self._roster, self._replies = config, roster, replies
        self._story, self._saving, self._owner = story, saving, owner
        self._fleet: Fleet = roster.fleet
        self._fencing: Fencing | None = None
        self._forming: Forming | None = None
        self._fence_s = self._place_s = 0.0
        self._phase_began = time.monotonic()

    def check(self) -> None:
        """Give up on whoever has missed a deadline."""
        for part in (self._fencing, self._forming):
            if part is not None:
                part.check()

    def forget_worker(self, name: str) -> None:
        """A worker is lost: nothing more comes from it."""
        if self._fencing is not None:
            self._fencing.forget_worker(name)

    def forget_node(self, name: str) -> None:
        """A node, or its keeper, is lost: nothing more comes from it."""
        if self._fencing is not None:
            self._fencing.forget_node(name)

    def fence(self, order: v.Fence) -> None:
        """Silence what is older, and find the best state that is left."""
        if self._forming is not None:
            self._forming.over = True
            self._forming = None
        self._phase_began = time.monotonic()
        self._fencing = self._new_fencing(order, self._fenced)
        self._fencing.start()

    def last_state(self, order: v.Fence, deadline: float) -> tuple[MemoryState, tuple[LocatedShard, ...]] | None:
        """The best state that memory has, with nobody left to change it; waits up to `deadline` (monotonic)."""
        patience = min(deadline, time.monotonic() + KEEPERS_S)
        while time.monotonic() < patience and any(node.info is None for node in self._fleet.nodes.values()):
            self._replies.wait(WAIT_S)
        found: list[Fencing] = []
        self._new_fencing(order, found.append).start()
        while not found and time.monotonic() < deadline:
            self._replies.wait(WAIT_S)
        return found[0].best() if found else None

    def _new_fencing(self, order: v.Fence, done: Callable[[Fencing], None]) -> Fencing:
        return Fencing(
            order=order,
            fleet=self._fleet,
            replies=self._replies,
            questions=self._roster.questions,
            quiet_timeout_s=QUIET_TIMEOUT_S,
            lose_worker=self._owner.worker_lost,
            suspect=self._roster.suspect,
            lose_node=self._roster.keeper_failed,
            hear=lambda name, reply: self._roster.hear(self._fleet.nodes[name], reply.events),
            held=self._owner.committed,
            progress=self._roster.progress,
            done=done,
        )

    def _fenced(self, fencing: Fencing) -> None:
        self._fencing = None
        story, saving = self._story, self._saving
        story.updated_step = max(story.updated_step, fencing.updated_step)
        best = fencing.best()
        if best is not None and best[0].step >= saving.written_step:
            state, shards = best
            story.restore(RestoreFrom("memory", state.step, shards), saving.layouts[state.generation])
        else:
            story.restore(*saving.from_storage())
        self._fence_s, self._phase_began = time.monotonic() - self._phase_began, time.monotonic()
        self._owner.fenced(fencing.order.generation, story.restored.point)

    def form(self, order: v.Form, fired: frozenset[int], snapshot_every: int) -> None:
        """Form a group and set it going. `fired`: planned faults that have struck already."""
        self._place_s = time.monotonic() - self._phase_began
        self._forming = Forming(
            order=order,
            config=self._config,
            fleet=self._fleet,
            questions=self._roster.questions,
            restore=self._story.restored,
            fired=fired,
            snapshot_every=snapshot_every,
            seen=self._story.commits.seen_before(order.restore.step + 1),
            formed=self._formed,
            failed=self._failed,
            suspect=self._roster.suspect,
            broken=self._owner.broken,
            ended=self._owner.training_ended,
        )
        self._saving.layouts[order.generation] = self._forming.layout.to_json()
        self._forming.start()

    def _formed(self, forming: Forming) -> None:
        self._forming = None
        self._saving.know(forming.tensors)
        tensors = ray.put(forming.tensors)
        for node in self._fleet.nodes.values():
            node.keeper.describe_state.remote(tensors)
        order = forming.order
        handles = [self._fleet.workers[name] for name in order.workers]
        members = tuple(
            Member(rank, handle.name, handle.info.pid if handle.info else 0, handle.node)
            for rank, handle in enumerate(handles)
        )
        self._saving.places = [handle.node for handle in handles]
        phases_s = {"fence": self._fence_s, "place": self._place_s, **forming.seconds}
        self._story.begin(order, self._saving.layouts[order.generation], members, phases_s)
        self._owner.formed(order.generation)

    def _failed(self, worker: str | None, cause: Cause) -> None:
        self._forming = None
        self._owner.form_failed(worker, cause)
