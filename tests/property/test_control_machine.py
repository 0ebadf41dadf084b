"""The state machine under random clusters: kills, node losses, joins, raised errors and slow answers in any order."""

from __future__ import annotations

from collections import Counter
from typing import get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.control import vocabulary as v
from elastictrain.control.budget import Blame, Budgets
from elastictrain.control.machine import advance, begin
from elastictrain.control.placement import assign_ranks, crowded, wanted_workers
from elastictrain.control.restore import ShardAt, newest_complete, ring
from elastictrain.control.state import Policy, State
from elastictrain.events import Cause

KILLED = Cause("signal", "SIGKILL")


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
    world_sizes=st.sampled_from([(1,), (2,), (1, 2), (1, 2, 4), (2, 4), (3,)]),
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
                ["kill", "lose", "keeper", "join", "raise", "broken", "formfail", "corrupt", "stale", "leave", "drain"]
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
        case "keeper" if nodes:
            world.lose_keeper(nodes[pick % len(nodes)])
        case "leave" if world.alive:
            world.ask_to_leave(sorted(world.alive)[pick % len(world.alive)], grace_s=5.0 * pick)
        case "drain" if nodes:
            world.drain(nodes[pick % len(nodes)], grace_s=5.0 * pick)
        case "join" if f"late{pick}" not in world.drained:
            world.tell(v.NodesJoined({f"late{pick}": 1 + pick % 3}))
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


@settings(max_examples=300, deadline=None)
@given(policies, st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(1, 3)), moves)
def test_any_history_ends_well(policy: Policy, nodes: dict[str, int], history: list[tuple[str, int]]) -> None:
    world = World(policy, nodes)
    for move, pick in history:
        if world.end is None:
            play(world, move, pick)
    for _ in range(400):  # from here on nothing breaks: the run must end by itself
        if world.end is not None:
            break
        world.settle()
        world.warm()
        world.train()
        world.now += 4
        if world.end is None:
            world.tell(v.Tick())
    assert world.end is not None
    assert world.end.status in ("complete", "failed")
    if world.end.status == "complete":
        assert world.committed == policy.steps
    else:
        assert world.end.cause is not None
        assert world.end.cause.message


def running(
    world_sizes: tuple[int, ...] = (1, 2),
    standby: int = 1,
    steps: int = 100,
    budgets: Budgets = Budgets(3),  # noqa: B008 - frozen
    **nodes: int,
) -> World:
    policy = Policy(steps, world_sizes, standby, budgets, 10.0, 60.0)
    world = World(policy, nodes or {"a": 2, "b": 2})
    for _ in range(20):
        world.settle()
        world.warm()
        world.train()
    assert world.state.phase == "running"
    return world


def test_a_killed_worker_is_replaced_by_the_standby_and_a_new_standby_follows() -> None:
    world = running()
    assert len(world.state.standbys) == 1
    standby, victim, survivor = world.state.standbys[0], world.group[1], world.group[0]
    world.kill(victim)
    assert world.state.phase == "fencing"
    assert not world.starting
    world.settle()
    assert world.state.phase == "forming"
    assert world.state.members == (survivor, standby)
    world.settle()
    world.train()
    assert len(world.starting) == 1


def test_a_standby_that_shares_a_slot_gives_its_rank_to_a_worker_with_one() -> None:
    """Two nodes with a slot each: the standby on one takes over at once from the other, and the rank returns there."""
    world = running(a=1, b=1)
    [standby] = world.state.standbys
    [victim] = [name for name in world.group if world.alive[name] != world.alive[standby]]
    home = world.alive[victim]
    world.kill(victim)
    world.settle()
    assert standby in world.group, "at once"
    generation, step = world.group_generation, world.step
    for _ in range(12):
        world.settle()
        world.warm()
        world.train()
    assert (world.group_generation, len(world.group)) == (generation + 1, 2)
    assert {world.alive[name] for name in world.group} == {home, world.alive[standby]}
    assert world.state.cause == "ranks move to slots of their own"
    assert world.step > step
    assert world.state.account.failures == 0
    assert len(world.state.standbys) == 1


def test_that_no_other_node_has_a_copy_is_said_once() -> None:
    alone = running(a=4)
    [told] = [words for words in alone.warnings if "every copy of the state" in words]
    assert "on node a" in told
    alone.kill(alone.group[1])
    for _ in range(3):
        alone.settle()
        alone.train()
    assert sum("every copy of the state" in words for words in alone.warnings) == 1
    for quiet in (running(), running(world_sizes=(1,), standby=0, a=1)):
        assert not [words for words in quiet.warnings if "copy" in words]


def test_a_survivor_keeps_its_rank() -> None:
    world = running()
    survivor = world.group[1]
    world.kill(world.group[0])
    world.settle()
    assert world.state.members[1] == survivor


def test_without_room_for_a_replacement_the_run_goes_on_smaller_and_grows_back() -> None:
    world = running(standby=0, a=1, b=1)
    world.lose_node("b")
    world.settle()
    assert len(world.state.members) == 1
    assert world.state.phase == "forming"
    world.settle()
    world.train()
    world.tell(v.NodesJoined({"c": 1}))
    step = world.committed
    for _ in range(10):
        world.settle()
        world.warm()
        world.train()
    assert len(world.group) == 2
    assert world.committed > step
    assert world.state.account.failures == 0


def test_a_run_grows_to_where_the_room_is_and_not_with_a_standby_beside_a_rank() -> None:
    policy = Policy(100, (1, 2), 1, Budgets(3), 10.0, 60.0, unreserved_standby=True)
    world = World(policy, {"a": 1})
    for _ in range(10):
        world.settle()
        world.warm()
        world.train()
    assert (len(world.group), len(world.state.standbys)) == (1, 1)
    world.tell(v.NodesJoined({"b": 1}))
    assert not world.pausing
    for _ in range(10):
        world.settle()
        world.warm()
        world.train()
    assert sorted(world.alive[name] for name in world.group) == ["a", "b"]


def test_a_spare_worker_that_no_larger_world_has_room_for_is_not_waited_for() -> None:
    world = running(standby=1, a=1, b=1)
    for standby in world.state.standbys:
        world.kill(standby)
    assert world.starting
    world.lose_node(world.alive[world.group[1]])
    world.settle()
    assert world.state.phase == "forming"
    assert len(world.state.members) == 1


def test_below_min_workers_it_waits_then_says_why_it_gave_up() -> None:
    world = running(world_sizes=(2,), standby=0, a=1, b=1)
    world.lose_node("b")
    world.settle()
    assert world.state.phase == "gathering"
    assert world.end is None
    world.now += 61
    world.tell(v.Tick())
    assert world.end is not None
    assert "elastic.min_workers" in str(world.end.cause)


def test_a_keeper_that_is_lost_while_the_next_group_gathers_is_not_read_from() -> None:
    """The state to go on from may have been there: whoever else holds it is found by another look."""
    world = running(world_sizes=(2,), standby=0, a=1, b=1)
    world.kill(world.group[0])
    world.settle()
    assert world.state.phase == "gathering"
    generation, failures = world.state.generation, world.state.account.failures
    world.lose_keeper("b")
    assert (world.state.phase, world.state.generation) == ("fencing", generation + 1)
    assert world.state.account.failures == failures == 1, "it is no failure of its own"
    for _ in range(6):
        world.settle()
        world.warm()
        world.train()
    assert world.state.phase == "running"


def test_the_same_exception_at_the_same_step_ends_the_run() -> None:
    world = running()
    bug = Cause("exception", "ValueError: bad", "Traceback ...", "ValueError")
    world.tell(v.RankRaised(world.group_generation, world.group[0], world.step + 1, bug))
    assert world.end is None
    world.settle()
    world.settle()
    world.tell(v.RankRaised(world.group_generation, world.group[0], world.step + 1, bug))
    assert world.end is not None
    assert world.end.cause is not None
    assert world.end.cause.traceback == bug.traceback
    assert (
        world.end.cause.message
        == f"ValueError: bad. It was raised at step {world.step + 1} again, so it is no accident."
    )


def test_a_verdict_on_the_loss_ends_the_run_at_once() -> None:
    world = running()
    verdict = Cause("bad_loss", "the loss of step 7 is nan", "", "BadLossError")
    world.tell(v.RankRaised(world.group_generation, world.group[0], world.step + 1, verdict))
    assert world.end == v.End("failed", verdict)


def test_corrupted_memory_costs_its_worker_and_the_steps_that_nobody_vouches_for() -> None:
    world = running()
    guilty, survivor, standby, committed = world.group[1], world.group[0], world.state.standbys[0], world.committed
    world.corrupt((guilty,), committed - 1)
    assert guilty not in world.alive
    world.settle()
    assert world.state.members == (survivor, standby)
    assert world.state.restore.step == committed - 1
    generation = world.group_generation
    world.settle()
    world.train()
    world.kill(world.group[1])
    assert world.state.trusted == {generation - 1: committed - 1}, "its old snapshots stay out while they are there"


def test_when_nobody_can_be_accused_all_keep_their_process() -> None:
    world = running()
    members = world.group
    world.corrupt((), world.committed)
    world.settle()
    assert world.state.members == members


@given(
    st.dictionaries(st.text("abc", min_size=1), st.integers(0, 4), max_size=5),
    st.integers(0, 12),
    st.integers(0, 2),
)
def test_placement_spreads_within_slots(nodes: dict[str, int], target: int, loose: int) -> None:
    orders = wanted_workers(nodes=nodes, workers={}, target=target, unreserved=loose)
    reserved = Counter(node for node, held in orders if held)
    assert all(reserved[node] <= nodes[node] for node in reserved)
    assert len(orders) == (min(target, sum(nodes.values()) + loose) if nodes else 0)
    room = [node for node in nodes if reserved[node] < nodes[node]]
    assert all(reserved[node] >= max(reserved.values(), default=0) - 1 for node in room)


@given(
    st.integers(1, 8),
    st.lists(st.sampled_from("abc"), min_size=8, max_size=12),
    st.permutations(range(12)),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 8)),
)
def test_ranks_are_stable_and_share_no_slot_while_another_is_free(
    size: int, nodes: list[str], order: list[int], slots: dict[str, int]
) -> None:
    ready = {f"worker-{i}": node for i, node in enumerate(nodes)}
    previous = [f"worker-{i}" for i in order[:6]]
    ranks = assign_ranks(size, ready, previous, slots)
    assert len(ranks) == len(set(ranks)) == size
    assert set(ranks) <= set(ready)
    there = Counter(nodes)
    most = min(size, sum(min(there[node], slots.get(node, 0)) for node in there))
    assert size - crowded([ready[name] for name in ranks], slots) == most, "as many as can have a slot have one"
    survivors = Counter(ready[name] for name in previous if name in ready)
    roomy = all(count <= slots.get(node, 0) for node, count in survivors.items())
    for rank, name in enumerate(previous[:size]):
        if name in ready and roomy:
            assert ranks[rank] == name
        elif name in ranks:
            assert ranks[rank] == name, "who stays keeps its rank"
    assert assign_ranks(size, ready, ranks, slots) == ranks, "nothing moves for nothing"


shards = st.builds(
    ShardAt, st.integers(0, 3), st.integers(0, 5), st.integers(0, 2), st.integers(1, 3), st.sampled_from("ab")
)


@given(st.lists(shards, max_size=30), st.dictionaries(st.integers(0, 3), st.integers(0, 5), max_size=2))
def test_the_newest_complete_state_is_chosen(found: list[ShardAt], trusted: dict[int, int]) -> None:
    found = [s for s in found if s.rank < s.world_size]
    best = newest_complete(found, trusted=trusted)
    found = [s for s in found if s.generation not in trusted or s.step <= trusted[s.generation]]
    complete = [
        (s.step, s.generation)
        for s in found
        if {o.rank for o in found if (o.step, o.generation, o.world_size) == (s.step, s.generation, s.world_size)}
        == set(range(s.world_size))
    ]
    assert (best is None) == (not complete)
    if best is not None:
        assert (best.step, best.generation) == max(complete)
        assert [s.rank for s in best.shards] == list(range(len(best.shards)))
        assert all((s.step, s.generation) == (best.step, best.generation) for s in best.shards)


def test_buddies_are_other_nodes() -> None:
    assert ring({"a": ""}) == {}
    assert ring({"b": "", "a": "", "c": ""}) == {"a": "b", "b": "c", "c": "a"}


@given(st.dictionaries(st.text("abcdef", min_size=1), st.sampled_from(["", "x", "y", "z"]), min_size=2, max_size=12))
def test_buddies_are_in_other_zones_where_that_can_be(zones: dict[str, str]) -> None:
    buddies = ring(zones)
    assert sorted(buddies) == sorted(buddies.values()) == sorted(zones)
    assert all(node != buddy for node, buddy in buddies.items())
    fullest = max(Counter(zones.values()).values())
    together = sum(zones[node] == zones[buddy] for node, buddy in buddies.items())
    assert together == max(0, 2 * fullest - len(zones))
