"""Performing `Form`: tell each worker its rank, collect the replies, set all of them going."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import ray
from ray.exceptions import RayActorError, RayError

from elastictrain.config import TrainConfig
from elastictrain.control.loss_guard import Seen
from elastictrain.control.restore import ring
from elastictrain.control.vocabulary import Form
from elastictrain.events import Cause
from elastictrain.plan.layout import Layout
from elastictrain.runtime.causes import explain, is_peer_loss
from elastictrain.runtime.fleet import Fleet
from elastictrain.runtime.protocol import FormOrder, FormReply, Outcome, RestoreFrom
from elastictrain.runtime.replies import Replies
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
    replies: Replies
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
        handles = [fleet.workers[name] for name in order.workers]
        rendezvous = handles[0].info.rendezvous if handles[0].info else ""
        faults = tuple(
            (index, fault) for index, fault in enumerate(self.config.faults) if fault.repeat or index not in self.fired
        )
        restore = ray.put(self.restore)
        for rank, handle in enumerate(handles):
            part = FormOrder(order.generation, rank, self.layout, rendezvous, faults, self.snapshot_every, self.seen)
            self.replies.expect(
                handle.actor.form.remote(part, restore),
                lambda reply, name=handle.name: self._joined(name, reply),  # type: ignore[misc]  # defaults bind
                lambda error, name=handle.name: self._missing(name, error),  # type: ignore[misc]  # defaults bind
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
        for worker in self.order.workers:
            self.replies.expect(
                self.fleet.workers[worker].actor.train.remote(generation),
                lambda outcome, worker=worker: self.ended(worker, generation, outcome),  # type: ignore[misc]  # defaults bind
                lambda error, worker=worker: self.suspect(worker, explain(error)),  # type: ignore[misc]  # defaults bind
            )

    def _missing(self, name: str, error: RayError) -> None:
        if self.over:
            return
        if isinstance(error, RayActorError):
            self.suspect(name, explain(error))
        elif is_peer_loss(error):
            self.broken(explain(error))
        else:
            self.over = True
            self.failed(name, explain(error))
