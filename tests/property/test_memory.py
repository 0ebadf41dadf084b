"""Runs that run out of memory: the micro-batch shrinks step by step, the global batch never, and every run ends."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import isclose

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from world import World, moves, plain, play, policies

from elastictrain.control import vocabulary as v
from elastictrain.control.budget import Budgets
from elastictrain.control.state import Policy
from elastictrain.data.order import EMPTY_CHAIN, SampleOrder
from elastictrain.events import Cause
from elastictrain.plan.layout import Layout, legal_world_sizes, micro_batch_ladder, plan_layout
from elastictrain.runtime.commits import CommitCollector
from elastictrain.runtime.protocol import StepRecord, pack_records
from elastictrain.state.tensors import ShardHeader

RAISED = Cause("oom", "OutOfMemoryError: CUDA out of memory", "", "OutOfMemoryError")
KILLED = Cause("oom", "SIGKILL by the kernel's OOM killer")


class TightWorld(World):
    """Ranks have the memory for micro-batches of up to `fits`."""

    def __init__(self, policy: Policy, nodes: dict[str, int], fits: int = 10**6) -> None:
        self.fits = fits
        self.tried: list[int] = []
        self.memory_warnings: list[str] = []
        super().__init__(policy, nodes)

    def perform(self, action: v.Action) -> None:
        super().perform(action)
        if isinstance(action, v.Form):
            micro_batch = action.choice.layout.micro_batch
            assert action.choice in [plan[len(action.workers)] for plan in self.policy.plans]
            assert not self.tried or micro_batch <= self.tried[-1], "it never grows"
            self.tried.append(micro_batch)
        elif isinstance(action, v.Warn) and action.topic == "memory":
            self.memory_warnings.append(action.message)

    def train(self) -> None:
        if self.tried and self.tried[-1] > self.fits:
            self.run_out()
        else:
            super().train()

    def run_out(self) -> None:
        if self.group and self.state.phase == "running" and self.group[0] in self.alive:
            self.tell(v.RankRaised(self.group_generation, self.group[0], self.step + 1, RAISED))

    def kill_for_memory(self) -> None:
        if self.group and self.group[0] in self.alive:
            worker = self.group[0]
            del self.alive[worker]
            self.tell(v.WorkerDied(worker, KILLED, self.step + 1))

    def finish(self) -> None:
        for _ in range(400):
            if self.end is not None:
                break
            self.settle()
            if self.end is None:
                self.warm()
                self.train()
                self.now += 4
            if self.end is None:
                self.tell(v.Tick())


@st.composite
def jobs(draw: st.DrawFn) -> tuple[int, int, tuple[int, ...]]:
    """Global batch, micro-batch and its legal world sizes."""
    global_batch = draw(st.integers(1, 96))
    micro_batch = draw(st.sampled_from([m for m in range(1, global_batch + 1) if global_batch % m == 0]))
    sizes = legal_world_sizes(global_batch, micro_batch, draw(st.integers(1, 3)), draw(st.integers(1, 12)))
    assume(sizes)
    return global_batch, micro_batch, sizes


@given(jobs())
def test_the_ladder_halves_at_least_and_stays_legal(job: tuple[int, int, tuple[int, ...]]) -> None:
    global_batch, micro_batch, sizes = job
    ladder = micro_batch_ladder(global_batch, micro_batch, sizes)
    assert (ladder[0], ladder[-1]) == (micro_batch, 1)
    assert all(2 * after <= before for before, after in pairwise(ladder))
    for rung in ladder:
        for size in sizes:
            layout = plan_layout(size, global_batch=global_batch, micro_batch=rung, zero_stage=1)
            assert layout.global_batch == global_batch
            assert layout.accumulation >= 1


def test_a_power_of_two_halves_and_doubles() -> None:
    assert micro_batch_ladder(16, 8, (1, 2)) == (8, 4, 2, 1)
    assert micro_batch_ladder(20, 5, (1, 2)) == (5, 2, 1)


@settings(max_examples=200, deadline=None)
@given(policies, st.sampled_from([(1,), (4, 2, 1), (6, 3, 1)]), st.integers(0, 6), moves)
def test_any_history_ends_whatever_the_memory(
    policy: Policy, ladder: tuple[int, ...], fits: int, history: list[tuple[str, int]]
) -> None:
    world = TightWorld(replace(policy, plans=plain(policy.world_sizes, ladder)), {"a": 2, "b": 2}, fits)
    for number, (move, pick) in enumerate(history):
        if world.end is None and number % 7 == 3:
            world.kill_for_memory() if pick % 2 else world.run_out()
        elif world.end is None:
            play(world, move, pick)
    world.finish()
    assert world.end is not None
    if world.end.status == "complete":
        assert world.committed == policy.steps
        shrunk = sum(before != after for before, after in pairwise(world.tried))
        assert shrunk <= len(world.memory_warnings) < len(ladder)
    else:
        assert world.end.cause is not None


@given(st.sampled_from([(1,), (4, 2, 1), (8, 4, 2, 1), (6, 3, 1)]), st.integers(0, 8), st.integers(0, 3))
def test_the_largest_micro_batch_that_fits_is_found_at_no_strike(
    ladder: tuple[int, ...], fits: int, max_failures: int
) -> None:
    policy = Policy(10, plain((1, 2), ladder), 0, Budgets(max_failures), 10.0, 60.0)
    world = TightWorld(policy, {"a": 2}, fits)
    world.finish()
    assert world.end is not None
    fitting = [m for m in ladder if m <= fits]
    if fitting:
        assert world.end.status == "complete"
        assert world.tried[-1] == fitting[0]
        assert world.tried == list(ladder[: ladder.index(fitting[0]) + 1])
    else:
        assert world.end.status == "failed"
        assert world.end.cause is not None
        for word in (RAISED.message, "step 1", "micro-batch 1", "activation_checkpointing", "zero_stage"):
            assert word in world.end.cause.message
        again = int(ladder == (1,) and max_failures > 0)  # once more, to see whether it was an accident
        assert world.tried == [*ladder, *[1] * again]


def started(max_failures: int = 3) -> TightWorld:
    world = TightWorld(Policy(100, plain((1, 2), (4, 2, 1)), 1, Budgets(max_failures), 10.0, 60.0), {"a": 2, "b": 2})
    for _ in range(20):
        world.settle()
        world.warm()
        world.train()
    assert world.state.phase == "running"
    return world


def go_on(world: TightWorld) -> None:
    """Until the next group runs."""
    for _ in range(8):
        world.settle()
        world.warm()
        world.now += 4
        if world.end is None:
            world.tell(v.Tick())


def test_what_changed_and_what_to_set_is_told() -> None:
    world = started()
    world.run_out()
    [warning] = world.memory_warnings
    assert "dp2 zero1 4x1" in warning
    assert "train.micro_batch=2" in warning
    assert world.state.account.failures == 0


def test_an_engine_that_does_not_fit_is_built_leaner_by_another_process() -> None:
    world = started()
    world.kill(world.group[0])
    world.warm()
    world.settle()
    doomed = world.group[1]
    world.tell(v.FormFailed(world.state.generation, doomed, RAISED))
    assert doomed not in world.alive
    go_on(world)
    assert world.tried[-2:] == [4, 2]
    assert world.state.account.charged == {"machine": 1}, "the layout was to blame"


def test_a_smaller_micro_batch_stays_through_later_failures() -> None:
    world = started()
    world.run_out()
    go_on(world)
    world.train()
    world.kill(world.group[1])
    go_on(world)
    assert world.tried[-2:] == [2, 2]


def test_the_first_worker_killed_for_memory_is_replaced_as_it_was_the_second_in_that_step_is_not() -> None:
    world = started()
    world.kill_for_memory()
    go_on(world)
    assert world.tried[-1] == 4
    world.kill_for_memory()
    go_on(world)
    assert world.tried[-1] == 2
    assert world.state.account.charged == {"memory": 2}
    assert "train.micro_batch=2" in world.memory_warnings[0]


def test_workers_killed_for_memory_again_and_again_end_the_run() -> None:
    world = started(max_failures=5)
    for _ in range(6):
        assert world.end is None
        world.kill_for_memory()
        go_on(world)
    assert world.end is not None
    assert "OOM killer" in str(world.end.cause)
    assert world.tried[-5:] == [4, 2, 1, 1, 1]


@settings(deadline=None)
@given(jobs(), st.data())
def test_samples_and_mean_loss_do_not_depend_on_the_micro_batch(
    job: tuple[int, int, tuple[int, ...]], data: st.DataObject
) -> None:
    """Steps under every rung of the ladder: the digest of an undisturbed run, and each step's mean over its samples."""
    global_batch, micro_batch, sizes = job
    order = SampleOrder(50, seed=3)
    collector, undisturbed = (CommitCollector(0, EMPTY_CHAIN) for _ in range(2))
    undisturbed.begin(0, 1, 0)
    for step, rung in enumerate(micro_batch_ladder(global_batch, micro_batch, sizes), start=1):
        size = data.draw(st.sampled_from(sizes))
        layout = plan_layout(size, global_batch=global_batch, micro_batch=rung, zero_stage=1)
        collector.begin(step, size, step - 1)
        told = [e for rank in range(size) for e in collector.add(_header(order, step, step, layout, rank), 0.0)]
        alone = undisturbed.add(_header(order, 0, step, Layout(1, 1, global_batch, 1), 0), 0.0)
        assert [e.sample_chain for e in told] == [e.sample_chain for e in alone]
        assert isclose(told[0].loss, alone[0].loss, rel_tol=1e-12)


def _header(order: SampleOrder, generation: int, step: int, layout: Layout, rank: int) -> ShardHeader:
    """What a rank tells of a step in which sample i has loss i squared."""
    batches = order.micro_batches(step, layout, rank)
    losses = tuple((m.global_index, sum(i * i for i in m.samples) / len(m.samples), m.samples) for m in batches)
    record = StepRecord(step, losses, 10, 0.0, 0.5, 0.1, 1.0, 0.0, 0.0)
    return ShardHeader(generation, step, rank, layout.dp, "", {}, pack_records([record]))
