"""How long control takes to decide for a large cluster: the real state machine, thousands of ranks, no processes.

A cluster of nodes with 8 slots each is played through: all workers come up, the group trains, a worker is killed, a
node is lost, a node is drained, nodes join, another generation is formed each time. Every call of `advance` is timed,
and so is choosing what to restore from the shards that keepers hold (`newest_complete`), pairing keepers (`ring`) and
writing and reading the live status. The bar is 100 ms for each.

    python benchmarks/control_plane.py                        10,000 ranks; some minutes, most of them 10,000 starts
    python benchmarks/control_plane.py --ranks 1000 --json    smaller; one JSON object
    python benchmarks/control_plane.py --live                 with processes and messages: see control_live.py
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import machine
from figures import table

from elastictrain.control import vocabulary as v
from elastictrain.control.budget import Budgets
from elastictrain.control.machine import advance, begin
from elastictrain.control.restore import ShardAt, newest_complete, ring
from elastictrain.control.state import Policy
from elastictrain.events import Cause
from elastictrain.plan.auto import Choice
from elastictrain.plan.layout import Layout
from elastictrain.status import NodeStatus, Status, WorkerStatus

SLOTS = 8
RANKS = 10_000
LIVE_RANKS = 100
LIVE_NODES = 4
BAR_S = 0.1
SPARE_NODES = 1
STEPS_BETWEEN = 3

T = TypeVar("T")


class Stopwatch:
    """Seconds of every call, by what it decided."""

    def __init__(self) -> None:
        self.taken: dict[str, list[float]] = defaultdict(list)

    def time(self, name: str, call: Callable[[], T]) -> T:
        """The call's result."""
        begun = time.perf_counter()
        found = call()
        self.taken[name].append(time.perf_counter() - begun)
        return found


class Cluster:
    """Does what the state machine says, at once, and tells it so."""

    def __init__(self, ranks: int, watch: Stopwatch) -> None:
        self.watch, self.now = watch, 0.0
        plan = {size: Choice(Layout(size, 1, 1, 1)) for size in range(SLOTS, ranks + 1, SLOTS)}
        policy = Policy(10**9, (plan,), 1, Budgets(3), 60.0, 600.0, unreserved_standby=False)
        self.state = begin(policy, v.RestorePoint("fresh", 0), 0, "start", 0.0)
        self.where: dict[str, str] = {}
        self.group: tuple[str, ...] = ()
        self.step = 0
        self._todo: list[tuple[str, v.Observation]] = []

    def tell(self, name: str, seen: v.Observation) -> None:
        """One observation, and all that follows from it."""
        self._todo.append((name, seen))
        while self._todo:
            what, observation = self._todo.pop(0)
            self.now += 0.001
            self.state, actions = self.watch.time(what, lambda o=observation: advance(self.state, o, self.now))  # type: ignore[misc]  # defaults bind
            for action in actions:
                self._perform(action)

    def _perform(self, action: v.Action) -> None:
        match action:
            case v.StartWorker(worker, node, _):
                self.where[worker] = node
                self._todo.append(("a worker is up", v.WorkerUp(worker)))
            case v.StopWorker(worker):
                self.where.pop(worker, None)
            case v.Fence(generation, _, _):
                self.group = ()
                self._todo.append(("fenced: the next group", v.Fenced(generation, v.RestorePoint("memory", self.step))))
            case v.Form(generation, workers):
                self.group = workers
                self._todo.append(("formed", v.Formed(generation)))
            case v.Pause(generation):
                self._todo.append(("paused for a resize", v.Paused(generation)))
            case v.End():
                raise RuntimeError(f"the run ended: {action}")
            case _:
                pass

    def train(self) -> None:
        """Some steps."""
        for _ in range(STEPS_BETWEEN):
            self.step += 1
            self.now += 1.0
            self.tell("a step is done", v.StepDone(self.state.generation, self.step))
            self.tell("tick", v.Tick())

    def lose_worker(self, rank: int) -> None:
        """SIGKILL."""
        name = self.group[rank]
        del self.where[name]
        self.tell("a worker died", v.WorkerDied(name, Cause("signal", "SIGKILL"), self.step + 1))

    def lose_node(self, node: str) -> None:
        """With all that is on it."""
        self.where = {worker: there for worker, there in self.where.items() if there != node}
        self.tell("a node is lost", v.NodeLost(node, Cause("node_lost", node)))


def measure(ranks: int) -> dict[str, Any]:
    """Play it through."""
    watch = Stopwatch()
    num_nodes = -(-ranks // SLOTS)
    nodes = [f"node-{number:05d}" for number in range(num_nodes + SPARE_NODES)]
    cluster = Cluster(ranks, watch)
    begun = time.perf_counter()
    cluster.tell("nodes joined", v.NodesJoined(dict.fromkeys(nodes[:-1], SLOTS)))
    start_s = time.perf_counter() - begun
    _require(cluster, ranks)
    cluster.train()
    cluster.lose_worker(ranks // 2)
    cluster.train()
    _require(cluster, ranks)
    cluster.lose_node(nodes[1])
    cluster.train()
    shrunk = len(cluster.group)
    cluster.tell("a node joined", v.NodesJoined({nodes[-1]: SLOTS}))
    for _ in range(1000):  # growing must pay: the machine waits until it has been calm for long enough
        if len(cluster.group) == ranks:
            break
        cluster.now += 10.0
        cluster.train()
    _require(cluster, ranks)
    cluster.tell("a node is drained", v.Leaving("node is drained", cluster.now + 60.0, node=nodes[2]))
    cluster.train()
    _weigh(cluster, watch, nodes)
    return {
        "machine": machine.describe(),
        "ranks": ranks,
        "nodes": num_nodes,
        "bar_s": BAR_S,
        "start_s": start_s,
        "shrunk_to": shrunk,
        "calls": {
            name: {"calls": len(taken), "median_s": sorted(taken)[len(taken) // 2], "worst_s": max(taken)}
            for name, taken in watch.taken.items()
        },
    }


def _weigh(cluster: Cluster, watch: Stopwatch, nodes: list[str]) -> None:
    """What is no call of `advance` and grows with the ranks too."""
    size = len(cluster.group)
    held = [
        ShardAt(1, step, rank, size, nodes[(rank // SLOTS + copy) % len(nodes)])
        for step in (6, 7)
        for rank in range(size)
        for copy in (0, 1)
    ]
    state = watch.time("what to restore from", lambda: newest_complete(held))
    if state is None or state.step != 7:
        raise RuntimeError(f"restored {state} where step 7 is whole")
    watch.time("pairing of keepers", lambda: ring({node: f"zone-{i % 3}" for i, node in enumerate(nodes)}))
    status = replace(
        Status.beginning("large", 0.0),
        workers=tuple(
            WorkerStatus(rank, name, 1000 + rank, cluster.where[name], "forward", 7)
            for rank, name in enumerate(cluster.group)
        ),
        nodes=tuple(NodeStatus(node, "10.0.0.1", alive=True) for node in nodes),
    )
    written = watch.time("status, written", lambda: json.dumps(status.to_json()))
    watch.time("status, read", lambda: Status.from_json(json.loads(written)))


def _require(cluster: Cluster, ranks: int) -> None:
    if len(cluster.group) != ranks or cluster.state.phase != "running":
        raise RuntimeError(f"{len(cluster.group)} of {ranks} ranks, {cluster.state.phase}")


def told(result: dict[str, Any]) -> str:
    """The result as a table for people."""
    rows = [
        [name, str(found["calls"]), f"{1000 * found['median_s']:.2f}", f"{1000 * found['worst_s']:.2f}"]
        for name, found in sorted(result["calls"].items(), key=lambda item: -item[1]["worst_s"])
    ]
    worst = max(found["worst_s"] for found in result["calls"].values())
    bar = f"worst: {1000 * worst:.1f} ms, bar {1000 * BAR_S:.0f} ms"
    return "\n".join(
        [
            machine.line(result["machine"]),
            "",
            table([f"{result['ranks']:,} ranks, {result['nodes']:,} nodes", "calls", "median ms", "worst ms"], rows),
            "",
            f"{bar}; all decisions of the start: {result['start_s']:.1f} s",
        ]
    )


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--live", action="store_true", help="supervisor, keepers and Ray, with workers without torch")
    parser.add_argument("--ranks", type=int, help="10,000, or 100 with --live; a multiple of 8, or of 4")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    ranks = arguments.ranks or (LIVE_RANKS if arguments.live else RANKS)
    slots = LIVE_NODES if arguments.live else SLOTS
    if ranks < 4 * slots or ranks % slots:
        parser.error(f"--ranks {ranks}: a multiple of {slots}, and at least {4 * slots}")
    if arguments.live:
        import control_live

        result = control_live.measure(ranks, LIVE_NODES)
        words = control_live.told(result)
    else:
        result = measure(ranks)
        words = told(result)
    print(json.dumps(result, indent=2) if arguments.json else words)


if __name__ == "__main__":
    main()
