"""Performing `Fence`: quiet the survivors, shut the keepers to the old generation, find the best state that is left.

survivors: break collectives, finish the copy in flight, drop the engine      (a deadline; who misses it is ended, and
           before it who is stuck in a collective: gloo forgets to tell one when a write to a dead peer fails at once)
keepers:   refuse the old generation, verify and list what they hold
then:      newest step that memory holds completely, or the newest verified durable checkpoint, or a fresh start
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ray.exceptions import RayError

from elastictrain.checkpoint.source import LocatedShard
from elastictrain.control.restore import MemoryState, ShardAt, newest_complete
from elastictrain.control.vocabulary import Fence
from elastictrain.events import Cause
from elastictrain.runtime.board import Progress
from elastictrain.runtime.estate import UPDATED
from elastictrain.runtime.fleet import Fleet
from elastictrain.runtime.protocol import FenceReply, Question
from elastictrain.runtime.questions import Questions
from elastictrain.runtime.replies import Replies
from elastictrain.state.tensors import ShardHeader

STUCK_S = 2.0
"""A collective raises within milliseconds of the order to leave it; busy machines are given so long."""
_STUCK = "it is stuck in a collective of a generation that was given up"


@dataclass
class Fencing:
    """One fence under way. `done` is called once, with everything that was found."""

    order: Fence
    fleet: Fleet
    replies: Replies
    questions: Questions
    quiet_timeout_s: float
    lose_worker: Callable[[str, Cause], None]
    suspect: Callable[[str, Cause], None]
    """A worker can't be reached; its keeper may know of what it died."""
    lose_node: Callable[[str, RayError], None]
    hear: Callable[[str, FenceReply], None]
    """What a keeper had not told yet; its snapshots come later, with those of all keepers."""
    held: Callable[[ShardHeader], None]
    """A snapshot in memory, in the order of the steps: each step's before those of the next."""
    progress: Mapping[str, Progress]
    """Where each worker is, as its keeper told last: another object each time."""
    done: Callable[[Fencing], None]
    shards: list[LocatedShard] = field(default_factory=list)
    updated_step: int = 0
    """Highest step whose update some rank had done."""
    finished: bool = False
    _workers: set[str] = field(default_factory=set)
    _keepers: set[str] | None = None
    _insisted: bool = False
    _waiting: dict[str, Progress] = field(default_factory=dict)
    """Where those were who waited in a collective when they should have left it."""

    def start(self) -> None:
        """Send the survivors home."""
        self._begun = time.monotonic()
        self._workers = {name for name in self.order.survivors if name in self.fleet.workers}
        self.questions.ask(
            Question("quiet", (self.order.generation,), together=True, again=True),
            sorted(self._workers),
            lambda name, _: self._quieted(name),
            lambda name, failure: self.suspect(name, failure.cause),
        )
        self._go_on()

    def check(self) -> None:
        """End whoever has missed the deadline; at half time, ask again past keepers that may hang."""
        waited_s = time.monotonic() - self._begun
        if self._keepers is None and waited_s > STUCK_S:
            for name in list(self._workers):
                if self._is_stuck(name):
                    self.lose_worker(name, Cause("hang", _STUCK))
        if self._keepers is None and not self._insisted and waited_s > self.quiet_timeout_s / 2:
            self._insisted = True
            self.questions.insist()
        if self._keepers is None and waited_s > self.quiet_timeout_s:
            for name in list(self._workers):
                late = f"did not leave its generation within {self.quiet_timeout_s:.0f} s"
                self.lose_worker(name, Cause("hang", late))

    def _is_stuck(self, name: str) -> bool:
        """Whether it was seen twice in a collective whose connections are shut: it never comes out of that."""
        at = self.progress.get(name)
        if at is None or not at.waiting or at.generation >= self.order.generation:
            self._waiting.pop(name, None)
            return False
        before = self._waiting.setdefault(name, at)
        return at is not before and (at.generation, at.waits) == (before.generation, before.waits)

    def forget_worker(self, name: str) -> None:
        """A worker is lost: it writes no more."""
        self._workers.discard(name)
        self._go_on()

    def forget_node(self, name: str) -> None:
        """A node, or its keeper, is lost: nothing comes from it, and what it had told is of no use."""
        self.shards = [located for located in self.shards if located.stored.where != name]
        self._workers -= {w for w in self._workers if w not in self.fleet.workers}
        if self._keepers is not None:
            self._keepers.discard(name)
        self._go_on()

    def best(self) -> tuple[MemoryState, tuple[LocatedShard, ...]] | None:
        """The newest complete state in memory, and where its shards are, by rank."""
        found = {
            ShardAt(h.generation, h.step, h.rank, h.world_size, located.stored.where): located
            for located in self.shards
            for h in [located.stored.header]
        }
        state = newest_complete(found, trusted=self.order.trusted)
        return (state, tuple(found[shard] for shard in state.shards)) if state else None

    def _quieted(self, name: str) -> None:
        self._workers.discard(name)
        self._go_on()

    def _go_on(self) -> None:
        if self._workers or self.finished:
            return
        if self._keepers is None:
            self._keepers = set(self.fleet.nodes)
            for name, node in list(self.fleet.nodes.items()):
                if node.info is None:
                    self._keepers.discard(name)
                    continue
                self.replies.expect(
                    node.keeper.fence.remote(self.order.generation, node.read),
                    lambda reply, name=name: self._fenced(name, reply),  # type: ignore[misc]  # defaults bind
                    lambda error, name=name: self.lose_node(name, error),  # type: ignore[misc]  # defaults bind
                )
        if not self._keepers:
            self.finished = True
            for header in sorted((located.stored.header for located in self.shards), key=lambda h: h.step):
                self.held(header)
            self.done(self)

    def _fenced(self, name: str, reply: FenceReply) -> None:
        if self._keepers is None or name not in self._keepers:
            return
        info = self.fleet.nodes[name].info
        self.hear(name, reply)
        for stored in reply.held:
            self.shards.append(LocatedShard(stored, info.replica_address if info else None))
        for progress in reply.progress.values():
            if progress.generation == self.order.generation - 1:
                self.updated_step = max(self.updated_step, progress.step - (progress.phase not in UPDATED))
        self._keepers.discard(name)
        self._go_on()
