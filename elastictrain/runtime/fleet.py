"""The actors of a run: a keeper on every node that has room, workers in reserved slots, standbys beside them.

Slots are placement groups of one bundle, pinned to their node. A slot stays reserved when its worker dies, so the
replacement never waits for another job to let go. Workers and slots are Ray's to end when this process dies; keepers
are not, and those of an earlier driver are taken back. Everything here only starts, finds and ends actors; what to
start is control's to say.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray._private.state import state
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from elastictrain.config import TrainConfig
from elastictrain.errors import ConfigError
from elastictrain.plan.figures import Figures, figures_of
from elastictrain.plan.rules import DEFAULT_ZERO_STAGE
from elastictrain.runtime.cluster import head_answers
from elastictrain.runtime.errands import Errands
from elastictrain.runtime.estate import Estate, Inherited, end_keepers, namespace, take_over
from elastictrain.runtime.keeper import KeeperActor
from elastictrain.runtime.protocol import KeeperInfo, KeeperTerms, WorkerInfo
from elastictrain.runtime.slot_name import slot_name
from elastictrain.runtime.worker import WorkerActor

ZONE_LABEL = "ray.io/availability-zone"
CLOSE_TIMEOUT_S = 60.0
"""How long the cluster may take to end what the run has there: as long as Ray's head may be silent."""
LEFT = (
    "keepers may be left on {}: {}. They end by themselves after {:.0f} s without a driver; workers and slots end with "
    "this process"
)
BAN_S = 20.0
"""A node that was given up on is left alone for so long: Ray takes up to 15 s to see that a node is dead."""


@dataclass
class Node:
    """A Ray node with room for workers."""

    name: str
    ray_id: str
    address: str
    slots: int
    zone: str
    """Where its machine stands, as far as Ray's labels tell: what fails together."""
    raylet: tuple[str, int]
    """Where its raylet listens."""
    keeper: Any = None
    info: KeeperInfo | None = None
    read: int = 0
    """Number of the last keeper event read."""
    leaving: bool = False
    """Ray drains it."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What Ray's head says of its nodes."""

    alive: list[dict[str, Any]]
    draining: dict[str, int]
    allotment: Mapping[str, int] | None
    """Slots that this run may use, by Ray's id of their node; None: all that there are."""


Allotment = Callable[[], Mapping[str, int] | None]
"""Asked again and again, from another thread; what it says is followed at the next step boundary."""


@dataclass
class WorkerHandle:
    """A worker actor."""

    name: str
    node: str
    actor: Any
    keeper: Any
    """That watches it."""
    slot: PlacementGroup | None
    info: WorkerInfo | None = None


def demand_of(config: TrainConfig, resources: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """What Ray reserves for a worker, of nodes with these resources. Raises ConfigError where that can't be enough."""
    per_worker = config.elastic.gpus_per_worker
    if per_worker is None:
        per_worker = 1.0 if any(of_node.get("GPU") for of_node in resources) else 0.0
    if config.train.dtype == "fp16" and not per_worker:
        raise ConfigError(
            "train.dtype fp16 needs GPUs, and the workers have none: set train.dtype to bf16 or fp32, or join a "
            "cluster with GPUs (cluster.address), and leave elastic.gpus_per_worker out"
        )
    return {"CPU": config.elastic.cpus_per_worker} | ({"GPU": per_worker} if per_worker else {})


def slots_of(node: dict[str, Any], demand: Mapping[str, float]) -> int:
    """How many workers a node has room for, whoever uses it now."""
    return min(int(node["Resources"].get(kind, 0) // amount) for kind, amount in demand.items())


@dataclass
class Fleet:
    """All actors of one attempt. `token` authenticates workers and keepers to each other."""

    config: TrainConfig
    token: bytes
    allotment: Allotment = lambda: None
    """How many of the slots are this run's, where it shares the cluster by rule."""
    worker_actor: Any = WorkerActor
    """What a worker is: an actor class."""
    inherited: dict[str, Inherited] = field(default_factory=dict)
    """Keepers of an earlier driver, by Ray's id of their node, that no node here has yet."""
    nodes: dict[str, Node] = field(default_factory=dict)
    workers: dict[str, WorkerHandle] = field(default_factory=dict)
    banned: dict[str, float] = field(default_factory=dict)
    """Ray ids of nodes given up on, and until when (monotonic seconds)."""
    zero_stage: int = DEFAULT_ZERO_STAGE
    """The one that workers get ready for."""
    draining: dict[str, int] = field(default_factory=dict)
    """Ray ids of nodes that are drained, with the deadline in unix ms, as of the last survey."""
    errands: Errands = field(default_factory=Errands)
    """What only Ray's head can do, and nobody here waits for."""
    _free_slots: dict[str, list[PlacementGroup]] = field(default_factory=lambda: defaultdict(list))
    _numbers: Iterable[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.demand = demand_of(self.config, self.resources)

    @property
    def on_gpus(self) -> bool:
        """Whether each worker holds a GPU."""
        return "GPU" in self.demand

    def figures(self) -> Figures:
        """What is known of the machines that there are now."""
        elastic = self.config.elastic
        workers = elastic.max_workers + elastic.standby
        return figures_of(self.resources, self.demand, self.config.cluster.device_memory, workers)

    def survey(self) -> Future[Survey]:
        """Ask Ray for its nodes."""

        def look() -> Survey:
            alive = [node for node in ray.nodes() if node["Alive"]]
            return Survey(alive, state.get_draining_nodes(), self.allotment())

        return self.errands.ask(look)

    def compare(self, survey: Survey) -> tuple[list[Node], list[str]]:
        """With Ray's nodes: (new ones with room, names of those that Ray has declared dead)."""
        now = time.monotonic()
        alive = {n["NodeID"]: n for n in survey.alive if self.banned.get(n["NodeID"], now) <= now}
        self.draining = survey.draining
        lost = [name for name, node in self.nodes.items() if node.ray_id not in alive]
        known = {node.ray_id for node in self.nodes.values()}
        new: list[Node] = []
        for ray_id, found in alive.items():
            slots = self._slots(found, survey)
            if ray_id not in known and ray_id not in self.draining and slots > 0:
                address = found["NodeManagerAddress"]
                taken = {node.name for node in [*self.nodes.values(), *new]}
                taken |= {left.name for left in self.inherited.values()}
                name = f"{address}#{ray_id[:6]}" if address in taken else address
                if ray_id in self.inherited:
                    name = self.inherited[ray_id].name
                zone = (found.get("Labels") or {}).get(ZONE_LABEL, "")
                new.append(Node(name, ray_id, address, slots, zone, (address, found["NodeManagerPort"])))
        return new, lost

    def resized(self, survey: Survey) -> dict[str, int]:
        """Nodes whose slots were allotted anew, and how many this run has there now."""
        if survey.allotment is None:
            return {}
        found = {node["NodeID"]: self._slots(node, survey) for node in survey.alive}
        changed = {n.name: found[n.ray_id] for n in self.nodes.values() if found.get(n.ray_id, n.slots) != n.slots}
        for name, slots in changed.items():
            self.nodes[name].slots = slots
            self._give_back(name)
        return changed

    def _slots(self, found: dict[str, Any], survey: Survey) -> int:
        slots = slots_of(found, self.demand)
        return slots if survey.allotment is None else min(slots, survey.allotment.get(found["NodeID"], 0))

    def drained(self) -> list[tuple[Node, float]]:
        """Nodes that were found draining for the first time, and the deadline of each (unix s; 0: none)."""
        found = [node for node in self.nodes.values() if node.ray_id in self.draining and not node.leaving]
        for node in found:
            node.leaving = True
        return [(node, self.draining[node.ray_id] / 1000) for node in found]

    def start_keeper(self, node: Node) -> Any:
        """Start the node's keeper, or take that of an earlier driver; the reply is its KeeperInfo."""
        run, left = self.config.run, self.inherited.pop(node.ray_id, None)
        if left is not None:
            node.keeper, node.read = left.keeper, left.read
        else:
            node.read = 0
            node.keeper = KeeperActor.options(
                name=f"keeper-{node.name}-{secrets.token_hex(4)}",
                namespace=namespace(self.config),
                lifetime="detached",
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.ray_id, soft=False),
            ).remote(run.name, node.name, run.storage, node.address, self.terms)
        node.info = None
        self.nodes[node.name] = node
        return node.keeper.describe.remote(time.time())

    @property
    def terms(self) -> KeeperTerms:
        """What keepers are told."""
        config = self.config
        patience_s, drive = config.elastic.orphan_timeout_s, config.parallel.offload_path
        return KeeperTerms(self.token, config.checkpoint.every, patience_s, drive)

    def take_over(self, generation: int) -> Estate | None:
        """Take what an earlier driver of this run left in memory, if it did; see `estate.take_over`."""
        estate = take_over(self.config, self.terms, generation)
        if estate is not None:
            self.inherited = dict(estate.keepers)
        return estate

    def disown(self) -> None:
        """End the keepers of an earlier driver that no node here has: what they hold is of no more use."""
        while self.inherited:
            self.end(self.inherited.popitem()[1].keeper)

    def start_worker(self, name: str, node_name: str, reserved: bool, data_folder: str) -> None:
        """Start a worker on a node."""
        config, node = self.config, self.nodes[node_name]
        slot = self._slot(node) if reserved else None
        strategy = (
            PlacementGroupSchedulingStrategy(slot, placement_group_bundle_index=0)
            if slot is not None
            else NodeAffinitySchedulingStrategy(node.ray_id, soft=False)
        )
        actor = self.worker_actor.options(
            name=f"{config.run.name}/{name}",
            num_cpus=self.demand["CPU"] if reserved else 0,
            num_gpus=self.demand.get("GPU", 0) if reserved else 0,
            scheduling_strategy=strategy,
        ).remote(name, node_name, config.to_dict(), data_folder, node.keeper, node.address, self.token)
        self.workers[name] = WorkerHandle(name, node_name, actor, node.keeper, slot)

    @property
    def num_slots(self) -> int:
        """How many slots are reserved, whether a worker has them or not."""
        free = sum(map(len, self._free_slots.values()))
        return free + sum(worker.slot is not None for worker in self.workers.values())

    def _slot(self, node: Node) -> PlacementGroup:
        if self._free_slots[node.name]:
            return self._free_slots[node.name].pop()
        return placement_group(
            [self.demand],
            name=slot_name(
                self.config.run.name,
                next(iter(self._numbers)),
                node.name,
                node.ray_id,
                is_trial=self.allotment() is not None,
            ),
            bundle_label_selector=[{"ray.io/node-id": node.ray_id}],
        )

    def drop_worker(self, name: str) -> None:
        """End a worker, if it still lives, and keep its slot for the next one, if the slot is still this run's."""
        worker = self.workers.pop(name, None)
        if worker is None:
            return
        self.end(worker.actor)
        if worker.slot is not None and worker.node in self.nodes:
            self._free_slots[worker.node].append(worker.slot)
            self._give_back(worker.node)

    def _give_back(self, node: str) -> None:
        """Let go of free slots that the node has too many of."""
        free = self._free_slots[node]
        held = len(free) + sum(w.node == node and w.slot is not None for w in self.workers.values())
        for _ in range(min(held - self.nodes[node].slots, len(free))):
            self.errands.do(f"give back a slot on node {node}", partial(remove_placement_group, free.pop()))

    def ban(self, ray_id: str, seconds: float) -> None:
        """Take no notice of a node for so long."""
        self.banned[ray_id] = time.monotonic() + seconds

    def drop_node(self, name: str, ban_s: float = BAN_S) -> None:
        """Give up on a node and everything on it, for so many seconds at least."""
        node = self.nodes.pop(name)
        self.ban(node.ray_id, ban_s)
        for worker in [w.name for w in self.workers.values() if w.node == name]:
            handle = self.workers.pop(worker)
            self.end(handle.actor)
            if handle.slot is not None:
                self._free_slots[name].append(handle.slot)
        for slot in self._free_slots.pop(name, []):
            self.errands.do(f"give back a slot on node {name}", partial(remove_placement_group, slot))
        self.end(node.keeper)

    def close(self) -> str:
        """End every actor, what is left of an earlier driver's too, and give back every slot; what is left, in words.

        Without Ray's head nobody can: what is left of the cluster ends by itself.
        """
        if not head_answers():
            return ""
        names = list(self.nodes)
        for name in names:
            self.drop_node(name)
        try:
            self.errands.ask(partial(end_keepers, self.config)).result(CLOSE_TIMEOUT_S)
        except (TimeoutError, RayError) as error:
            why = f"{CLOSE_TIMEOUT_S:.0f} s were not enough" if isinstance(error, TimeoutError) else str(error)
            return LEFT.format(", ".join(names) or "the cluster", why, self.config.elastic.orphan_timeout_s)
        return ""

    def end(self, actor: Any) -> None:
        """Have an actor ended."""
        self.errands.do("end an actor", partial(ray.kill, actor))
