"""What an earlier driver of the run left in the cluster's memory: its keepers, found by name and taken over.

Keepers are detached actors in a namespace of their own for each run, so they outlive a driver that is killed. Taking
over fences everything below a new generation, ends the old driver's workers where Ray has not done so yet, and gives
the keepers a new token: the old one is never asked for. Trust ends where Ray's does: whoever may talk to the cluster
may talk to a keeper.

Cost: a look at Ray's names; where there are keepers, one pass over their snapshots, to verify them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import list_named_actors

from elastictrain.checkpoint.source import LocatedShard
from elastictrain.config import TrainConfig
from elastictrain.control.restore import MemoryState, ShardAt, complete_states
from elastictrain.errors import RunConflictError
from elastictrain.runtime.cluster import head_answers
from elastictrain.runtime.protocol import Bequest, Greeting, KeeperEvent, KeeperTerms, WorkerExited
from elastictrain.state.tensors import LogicalTensor, ShardHeader
from elastictrain.version import __version__

GREET_TIMEOUT_S = 5.0
SUCCEED_TIMEOUT_S = 300.0
"""All that a node holds is read and verified first."""
QUIET_S = 3.0
"""A driver that lives is heard of by each keeper twice a second."""
UPDATED = ("snapshot", "idle")
"""Phases in which a rank has done the update of its step."""


def namespace(config: TrainConfig) -> str:
    """Where the keepers of this run are named: runs of the same name in other storages are other runs."""
    place = sha256(f"{config.run.storage}\n{config.run.name}".encode()).hexdigest()[:12]
    return f"elastictrain/{config.run.name}/{place}"


@dataclass(frozen=True, slots=True)
class Inherited:
    """A keeper that was taken over."""

    keeper: Any
    name: str
    """Of its node, as it knows it."""
    read: int
    """Number of its last event of before."""


@dataclass
class Estate:
    """The keepers that were taken over, and what they told."""

    keepers: dict[str, Inherited]
    """By Ray's id of their node."""
    bequests: Sequence[Bequest]
    generation: int
    """Everything below it is fenced."""
    shards: dict[ShardAt, LocatedShard] = field(init=False)

    def __post_init__(self) -> None:
        self.shards = {
            ShardAt(h.generation, h.step, h.rank, h.world_size, stored.where): LocatedShard(stored, b.replica_address)
            for b in self.bequests
            for stored in b.held
            for h in [stored.header]
        }

    def states(self) -> Iterator[MemoryState]:
        """Complete ones, the newest first; none that the old driver's workers found corrupted."""
        trusted: dict[int, int] = {}
        for bequest in self.bequests:
            for generation, step in bequest.trusted.items():
                trusted[generation] = min(step, trusted.get(generation, step))
        return complete_states(self.shards, trusted=trusted)

    def headers(self) -> list[ShardHeader]:
        """Of all snapshots that are held, or were and may not be on record."""
        untold = [header for bequest in self.bequests for header in bequest.untold]
        return [*untold, *(shard.stored.header for shard in self.shards.values())]

    def events(self) -> Iterator[KeeperEvent]:
        """What keepers told nobody, or somebody who did not live to write it down."""
        return (event for bequest in self.bequests for _, event in bequest.events)

    def updated_step(self, generation: int) -> int:
        """The highest step whose update some rank of this generation had done when it ended; 0 where none is known."""
        ends = [e for e in self.events() if isinstance(e, WorkerExited) and e.generation == generation]
        return max((e.step - (e.phase not in UPDATED) for e in ends), default=0)

    @property
    def tensors(self) -> tuple[LogicalTensor, ...]:
        """All of the state's; empty where no group was ever formed."""
        return max((bequest.tensors for bequest in self.bequests), key=len, default=())


def take_over(config: TrainConfig, terms: KeeperTerms, generation: int) -> Estate | None:
    """The keepers of an earlier driver of this run; None where there are none. Ends those that can't be used.

    `generation` is the lowest that this attempt may begin with. Raises RunConflictError when a driver lives: on another
    machine, since the run's lock is held by one at most on this.
    """
    found = _named(config)
    _refuse_company(config, found)
    greeted = [(keeper, said) for keeper, said in _greet(found) if said is not None and said.version == __version__]
    for keeper in found:
        if keeper not in [usable for usable, _ in greeted]:
            _end(keeper)
    if not greeted:
        return None
    generation = max(generation, *(greeting.newest_generation + 1 for _, greeting in greeted))
    calls = [(keeper, keeper.succeed.remote(terms, generation)) for keeper, _ in greeted]
    ray.wait([call for _, call in calls], num_returns=len(calls), timeout=SUCCEED_TIMEOUT_S)
    taken: list[tuple[Any, Bequest]] = []
    for keeper, call in calls:
        try:
            taken.append((keeper, ray.get(call, timeout=0)))
        except RayError:  # lost like any other keeper
            _end(keeper)
    keepers = {b.ray_id: Inherited(keeper, b.node, max((n for n, _ in b.events), default=0)) for keeper, b in taken}
    return Estate(keepers, [b for _, b in taken], generation) if taken else None


def end_orphans(config: TrainConfig) -> None:
    """End the keepers of an earlier driver, for an attempt that is stopped before it has taken them over."""
    for keeper, said in _greet(_named(config)) if head_answers() else ():
        if said is None or said.silent_s >= QUIET_S:
            _end(keeper)


def end_keepers(config: TrainConfig) -> None:
    """End all keepers of this run that are there, for the only driver that it has."""
    for keeper in _named(config) if head_answers() else ():  # a cluster that is gone has none
        _end(keeper)


def _named(config: TrainConfig) -> list[Any]:
    here = namespace(config)
    found = []
    for named in list_named_actors(all_namespaces=True):
        if named["namespace"] == here:
            with suppress(ValueError):  # it ended in between
                found.append(ray.get_actor(named["name"], namespace=here))
    return found


def _greet(keepers: Sequence[Any]) -> list[tuple[Any, Greeting | None]]:
    """What each says; None from one that does not answer."""
    calls = [keeper.greet.remote() for keeper in keepers]
    if calls:
        ray.wait(calls, num_returns=len(calls), timeout=GREET_TIMEOUT_S)
    answers: list[tuple[Any, Greeting | None]] = []
    for keeper, call in zip(keepers, calls):
        try:
            answers.append((keeper, ray.get(call, timeout=0)))
        except RayError:
            answers.append((keeper, None))
    return answers


def _refuse_company(config: TrainConfig, keepers: Sequence[Any]) -> None:
    """Raise RunConflictError if the keepers go on hearing of a driver; nothing was changed then."""
    for last_look in (False, True):
        silent_s = min((g.silent_s for _, g in _greet(keepers) if g is not None), default=QUIET_S)
        if silent_s >= QUIET_S:
            return
        if not last_look:
            time.sleep(QUIET_S - silent_s)
    raise RunConflictError(
        f"run {config.run.name!r} is being trained now: its keepers hear of another driver. Wait for it, stop it, or "
        f"choose another run.name."
    )


def _end(keeper: Any) -> None:
    with suppress(RayError):
        ray.kill(keeper)
