"""Performing `Form`: tell each worker its rank, collect the replies, set all of them going."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import ray

from elastictrain.config import TrainConfig
from elastictrain.control.loss_guard import Seen
from elastictrain.control.restore import ring
from elastictrain.control.vocabulary import Form
from elastictrain.events import Cause
from elastictrain.plan.layout import Layout
from elastictrain.runtime.causes import Failure
from elastictrain.runtime.fleet import Fleet
from elastictrain.runtime.protocol import FormOrder, FormReply, Outcome, Question, RestoreFrom
from elastictrain.runtime.questions import Questions
from elastictrain.state.tensors import LogicalTensor

FORM_TIMEOUT_S = 120.0
"""A worker that takes longer to build its engine is replaced."""


def pair_keepers(fleet: Fleet, places: Iterable[str]) -> None:
    """Give each node of `places` another as buddy, of those that others are left one that does not leave."""
    zones, used = {name: node.zone for name, node in fleet.nodes.items()}, set(places)
    spare = [name for name, node in fleet.nodes.items() if name not in used and not node.leaving]
    spare.sort(key=lambda n: (zones[n] in {zones[u] for u in used}, n))
    buddies = ring({n: zones[n] for n in used}) or ring({n: zones[n] for n in [*used, *spare[:1]]})
    for name, node in fleet.nodes.items():
        buddy = fleet.nodes.get(buddies.get(name, ""))
        node.keeper.set_buddy.remote(buddy.info.replica_address if buddy and buddy.info else None)


@dataclass
class Forming:
    """One generation on its way. Calls exactly one of `formed` and `failed`, unless it is abandoned."""

    order: Form
    config: TrainConfig
    fleet: Fleet
    questions: Questions
    restore: RestoreFrom
    fired: frozenset[int]
    """Planned faults that have struck already."""
    snapshot_every: int
    seen: tuple[Seen, ...]
    """What is recorded of the last steps before the restored state's."""
    formed: Callable[[Forming], None]
    failed: Callable[[str | None, Cause], None]
    suspect: Callable[[str, Cause], None]
    """A worker can't be reached; it may be dead."""
    broken: Callable[[Cause], None]
    """A peer went away; nobody knows yet which."""
    ended: Callable[[str, int, Outcome], None]
    seconds: dict[str, float] = field(default_factory=dict)
    tensors: tuple[LogicalTensor, ...] = ()
    over: bool = False

    @property
    def layout(self) -> Layout:
        """Of the new generation."""
        return self.order.choice.layout

    def start(self) -> None:
        """Send the orders."""
        order, fleet = self.order, self.fleet
        self._begun = time.monotonic()
        self._waiting = set(order.workers)
        pair_keepers(fleet, [fleet.workers[name].node for name in order.workers])
        first = fleet.workers[order.workers[0]]
        rendezvous = first.info.rendezvous if first.info else ""
        faults = tuple(
            (index, fault) for index, fault in enumerate(self.config.faults) if fault.repeat or index not in self.fired
        )
        told = FormOrder(order.generation, self.layout, rendezvous, faults, self.snapshot_every, self.seen)
        # where each shard lies grows with the group: it is the driver's to keep, and every node fetches it once
        self.questions.ask(
            Question("form", (told, ray.put(self.restore)), together=True),
            order.workers,
            self._joined,
            self._missing,
            own={name: (rank,) for rank, name in enumerate(order.workers)},
        )

    def check(self) -> None:
        """Give up on whoever has missed the deadline."""
        if not self.over and time.monotonic() > self._begun + FORM_TIMEOUT_S:
            self.over = True
            late = f"did not join its group within {FORM_TIMEOUT_S:.0f} s"
            self.failed(min(self._waiting), Cause("engine", late))

    def _joined(self, name: str, reply: FormReply) -> None:
        if self.over:
            return
        self._waiting.discard(name)
        self.tensors = self.tensors or reply.tensors
        for phase, seconds in reply.seconds.items():
            self.seconds[phase] = max(self.seconds.get(phase, 0.0), seconds)
        if self._waiting:
            return
        self.over = True
        self.formed(self)  # first: what is on record of a generation is there before any of its steps
        generation = self.order.generation
        self.questions.ask(
            Question("train", (generation,)),
            self.order.workers,
            lambda worker, outcome: self.ended(worker, generation, outcome),
            lambda worker, failure: self.suspect(worker, failure.cause),
        )

    def _missing(self, name: str, failure: Failure) -> None:
        if self.over:
            return
        if failure.unreachable:
            self.suspect(name, failure.cause)
        elif failure.peers_lost:
            self.broken(failure.cause)
        else:
            self.over = True
            self.failed(name, failure.cause)
