"""A cluster without processes, which does what the state machine says and looks at every action; and moves to play."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from hypothesis import strategies as st

from elastictrain.control import vocabulary as v
from elastictrain.control.budget import Blame, Budgets
from elastictrain.control.machine import advance, begin
from elastictrain.control.state import Policy, State
from elastictrain.events import Cause
from elastictrain.plan.auto import Choice, Plans
from elastictrain.plan.layout import Layout

KILLED = Cause("signal", "SIGKILL")


def plain(world_sizes: Sequence[int], micro_batches: Sequence[int] = (1,)) -> Plans:
    """Data parallelism at each of these sizes; when memory runs out, with the next micro-batch."""
    return tuple({n: Choice(Layout(n, 1, m, 1)) for n in world_sizes} for m in micro_batches)


class World:
    """Performs actions as a cluster would, and checks the invariants at every one of them."""

    def __init__(self, policy: Policy, nodes: dict[str, int]) -> None:
        self.now = 0.0
        self.state: State = begin(policy, v.RestorePoint("fresh", 0), 0, "start", self.now)
        self.policy = policy
        self.alive: dict[str, str] = {}
        self.starting: list[str] = []
        self.fenced_below = 0
        self.answer: v.Observation | None = None
        self.group: tuple[str, ...] = ()
        self.group_generation = -1
        self.step = 0
        self.restored = 0
        self.committed = 0
        self.end: v.End | None = None
        self.pausing = False
        self.leaving: set[str] = set()
        self.drained: set[str] = set()
        self.warnings: list[str] = []
        self.tell(v.NodesJoined(nodes))

    def tell(self, seen: v.Observation) -> None:
        before, self.seen = self.state, seen
        self.state, actions = advance(self.state, seen, self.now)
        assert advance(before, seen, self.now) == (self.state, actions), "a decision is a function"
        for action in actions:
            self.perform(action)

    def perform(self, action: v.Action) -> None:
        assert self.end is None, f"{action} after the end"
        match action:
            case v.StartWorker(worker, node, _):
                assert worker not in self.alive
                assert node in self.state.nodes
                self.alive[worker] = node
                self.starting.append(worker)
            case v.StopWorker(worker):
                failed = isinstance(self.seen, v.FormFailed) and self.seen.worker == worker
                assert failed or worker not in self.leaving or worker not in self.group, "it holds a rank"
                self.alive.pop(worker, None)
                if worker in self.starting:
                    self.starting.remove(worker)
            case v.Fence(generation, survivors, trusted):
                assert generation > self.fenced_below, "generations only rise"
                assert set(survivors) <= set(self.alive)
                self.fenced_below, self.group, self.pausing = generation, (), False
                self.committed = min(self.committed, trusted.get(self.group_generation, self.committed))
                self.answer = v.Fenced(generation, v.RestorePoint("memory", self.committed))
            case v.Form(generation, workers, restore):
                assert not self.group, "the old group is gone before a new one forms"
                assert generation >= self.fenced_below
                assert generation > self.group_generation
                assert len(workers) in self.policy.world_sizes
                assert len(set(workers)) == len(workers)
                assert not self.leaving & set(workers), "who leaves takes no rank"
                assert all(w in self.alive and w not in self.starting for w in workers)
                assert restore.step == self.committed, "nothing lost, nothing twice"
                self.group, self.group_generation, self.step = workers, generation, restore.step
                self.restored = restore.step
                self.answer = v.Formed(generation)
            case v.Pause(generation):
                assert generation == self.group_generation
                assert not self.pausing
                self.pausing = True
            case v.ReleaseNode(node, alone_s):
                assert node in self.drained or alone_s
                assert node not in self.alive.values()
                assert self.group, "its memory may be needed until others have the state"
                self.drained.discard(node)
            case v.Save():
                assert not self.group
            case v.Warn(_, message):
                self.warnings.append(message)
            case v.End():
                self.end = action

    def settle(self) -> None:
        """Answer what is outstanding."""
        answer, self.answer = self.answer, None
        if answer is not None:
            self.tell(answer)

    def warm(self) -> None:
        if self.starting:
            self.tell(v.WorkerUp(self.starting.pop(0)))

    def train(self) -> None:
        running = self.group and self.state.phase == "running" and all(w in self.alive for w in self.group)
        if running:
            self.step += 1
            self.committed = self.step
            paused, generation = self.pausing, self.group_generation
            self.tell(v.StepDone(generation, self.step))
            if paused:
                self.tell(v.Paused(generation))
                assert self.end or self.state.phase == "fencing"

    def kill(self, worker: str) -> None:
        del self.alive[worker]
        if worker in self.starting:
            self.starting.remove(worker)
        self.tell(v.WorkerDied(worker, KILLED, self.step + 1))

    def ask_to_leave(self, worker: str, grace_s: float = 40.0) -> None:
        self.leaving.add(worker)
        self.tell(v.Leaving(f"{worker} leaves: SIGTERM", self.now + grace_s, worker=worker))

    def drain(self, node: str, grace_s: float = 40.0) -> None:
        self.drained.add(node)
        self.leaving |= {worker for worker, where in self.alive.items() if where == node}
        self.tell(v.Leaving(f"node {node} is drained", self.now + grace_s, node=node))

    def corrupt(self, workers: tuple[str, ...], trusted_step: int) -> None:
        self.leaving -= set(workers)
        self.tell(v.StateCorrupted(self.group_generation, workers, trusted_step, Cause("corrupted", "a bit")))
        assert not set(workers) & set(self.state.workers), "bad memory is not used again"

    def lose_node(self, node: str) -> None:
        self.drained.discard(node)
        for worker in [w for w, n in self.alive.items() if n == node]:
            del self.alive[worker]
            if worker in self.starting:
                self.starting.remove(worker)
        self.tell(v.NodeLost(node, Cause("node_lost", node)))

    def unmet(self, node: str) -> bool:
        """Whether none of its workers was up yet."""
        there = {worker for worker, where in self.alive.items() if where == node}
        return there <= set(self.starting) and not there & set(self.group)

    def refuse_node(self, node: str) -> None:
        """Its keeper found it unfit, before any of its workers was told to be up."""
        self.drained.discard(node)
        for worker in [w for w, n in self.alive.items() if n == node]:
            del self.alive[worker]
            self.starting.remove(worker)
        before = self.state
        self.tell(v.NodeRefused(node))
        assert self.state.losses_at == before.losses_at, "nothing is lost"

    def lose_keeper(self, node: str) -> None:
        there = [w for w, n in self.alive.items() if n == node]
        self.starting += [w for w in there if w not in self.starting]  # until the next keeper has adopted them
        self.tell(v.KeeperLost(node, Cause("keeper", node)))


budgets = st.builds(
    Budgets,
    max_failures=st.integers(0, 4),
    own=st.dictionaries(st.sampled_from(get_args(Blame)), st.integers(0, 6), max_size=3),
    backoff_s=st.floats(0, 20),
    max_backoff_s=st.floats(0, 40),
)
policies = st.builds(
    Policy,
    steps=st.integers(1, 30),
    plans=st.sampled_from([(1,), (2,), (1, 2), (1, 2, 4), (2, 4), (3,)]).map(lambda sizes: plain(sizes)),
    standby=st.integers(0, 2),
    budgets=budgets,
    replace_timeout_s=st.just(10.0),
    wait_timeout_s=st.just(60.0),
    unreserved_standby=st.booleans(),
)
moves = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["settle", "warm", "train", "train", "tick"]), st.just(0)),
        st.tuples(
            st.sampled_from(
                [
                    *("kill", "lose", "refuse", "keeper", "join", "slots", "raise"),
                    *("broken", "formfail", "corrupt", "stale", "leave", "drain"),
                ]
            ),
            st.integers(0, 9),
        ),
    ),
    max_size=120,
)


def play(world: World, move: str, pick: int) -> None:
    nodes = sorted(world.state.nodes)
    match move:
        case "settle" | "warm" | "train":
            getattr(world, move)()
        case "tick":
            world.now += 4
            world.tell(v.Tick())
        case "kill" if world.alive:
            world.kill(sorted(world.alive)[pick % len(world.alive)])
        case "lose" if nodes:
            world.lose_node(nodes[pick % len(nodes)])
        case "refuse" if nodes and world.unmet(nodes[pick % len(nodes)]):
            world.refuse_node(nodes[pick % len(nodes)])
        case "keeper" if nodes:
            world.lose_keeper(nodes[pick % len(nodes)])
        case "leave" if world.alive:
            world.ask_to_leave(sorted(world.alive)[pick % len(world.alive)], grace_s=5.0 * pick)
        case "drain" if nodes:
            world.drain(nodes[pick % len(nodes)], grace_s=5.0 * pick)
        case "join" if f"late{pick}" not in world.drained:
            world.tell(v.NodesJoined({f"late{pick}": 1 + pick % 3}))
        case "slots" if nodes:
            world.tell(v.NodesJoined({nodes[pick % len(nodes)]: pick % 4}))
        case "raise" if world.group and world.state.phase == "running":
            cause = Cause("exception", "ValueError: x", "", f"E{pick}")
            world.tell(v.RankRaised(world.group_generation, world.group[0], world.step + 1, cause))
        case "broken" if world.group:
            world.tell(v.PeersBroken(world.group_generation, Cause("unknown", "broken")))
        case "formfail" if world.group and isinstance(world.answer, v.Formed):
            world.answer = v.FormFailed(world.group_generation, world.group[pick % len(world.group)], KILLED)
        case "corrupt" if world.group and world.state.phase == "running":
            world.corrupt(world.group[: pick % 3], max(world.restored, world.committed - pick % 2))
        case "stale":
            before = world.state
            world.tell(v.StepDone(before.generation - 1, 10**6))
            world.tell(v.RankRaised(before.generation - 1, "worker-0", 1, KILLED))
            world.tell(v.WorkerUp("worker-999"))
            assert world.state == before


def running(
    world_sizes: tuple[int, ...] = (1, 2),
    standby: int = 1,
    steps: int = 100,
    budgets: Budgets = Budgets(3),  # noqa: B008 - frozen
    **nodes: int,
) -> World:
    policy = Policy(steps, plain(world_sizes), standby, budgets, 10.0, 60.0)
    world = World(policy, nodes or {"a": 2, "b": 2})
    for _ in range(20):
        world.settle()
        world.warm()
        world.train()
    assert world.state.phase == "running"
    return world
