"""Budgets of failures: machines may fail as long as the run gets on, everything ends, and nobody waits for long."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import KILLED, World, budgets, plain, policies, running

from elastictrain.config import ElasticSection, TrainConfig
from elastictrain.control import vocabulary as v
from elastictrain.control.budget import FREE_RESTARTS, Account, Blame, Budgets, blame
from elastictrain.control.state import Policy
from elastictrain.events import Cause

blames = st.sampled_from(get_args(Blame))


def go_on(world: World) -> None:
    """Until the next group trains, however long it takes; without a step."""
    for _ in range(60):
        if world.end is not None or world.state.phase == "running":
            return
        world.now += 1
        for _ in range(4):
            world.settle()
            world.warm()
        if world.end is None:
            world.tell(v.Tick())


def lose(world: World, how: str) -> None:
    """One machine's failure that takes a rank with it."""
    node = world.alive[world.group[0]]
    match how:
        case "process":
            world.kill(world.group[0])
        case "node":
            world.lose_node(node)
            world.tell(v.NodesJoined({f"{node}+": 2}))
        case "keeper":
            world.lose_keeper(node)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2), st.lists(st.lists(st.sampled_from(["process", "node", "keeper"]), max_size=10), max_size=12))
def test_machine_losses_never_end_a_run_that_gets_on(max_failures: int, bursts: list[list[str]]) -> None:
    world = running(budgets=Budgets(max_failures), a=2, b=2)
    for burst in bursts:
        for how in burst:
            lose(world, how)
            go_on(world)
            assert world.end is None, "at most ten in a row, and a step after them"
        world.train()
        assert world.state.account.failures == 0
        go_on(world)  # where a node was quarantined, its ranks move


def break_it(world: World, how: str, number: int) -> None:
    """The next thing goes wrong, whatever it is."""
    match how:
        case "raise" if world.state.phase == "running":
            bug = Cause("exception", f"E{number}: x", "", f"E{number}")
            world.tell(v.RankRaised(world.group_generation, world.group[0], world.step + 1, bug))
        case "hang" | "exit" | "killed for memory" if world.group:
            kind = {"hang": "hang", "exit": "exit", "killed for memory": "oom"}[how]
            worker = world.group[0]
            if world.alive.pop(worker, None):
                world.tell(v.WorkerDied(worker, Cause(kind, how), number))
        case "corrupt" if world.state.phase == "running":
            world.corrupt(world.group[:1], world.restored)
        case "broken" if world.group:
            world.tell(v.PeersBroken(world.group_generation, Cause("collective", "broken")))
        case "no start" if world.starting:
            world.kill(world.starting[0])
        case "step":
            world.train()
        case "kill" | _ if world.alive:
            world.kill(sorted(world.alive)[0])


evils = st.lists(
    st.sampled_from(["raise", "hang", "exit", "killed for memory", "corrupt", "broken", "no start", "kill"]),
    min_size=1,
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(policies, evils)
def test_a_run_that_gets_nowhere_ends(policy: Policy, evil: list[str]) -> None:
    """Nothing but failures, for ever: the budgets are spent in the end, and the pauses are as bounded as told."""
    world, forms = World(policy, {"a": 3, "b": 3}), 0
    for number in range(600):
        if world.end is not None:
            break
        if number % 3 == 2:
            break_it(world, evil[number // 3 % len(evil)], number)
        world.now += 10
        for _ in range(6):
            if world.end is None:
                forms += isinstance(world.answer, v.Formed)
                world.settle()
                world.warm()
        if world.end is None:
            world.tell(v.Tick())
    assert world.end is not None
    assert forms <= 1 + sum(policy.budgets.allowed(each) for each in get_args(Blame))


@given(budgets, st.integers(0, 2000))
def test_pauses_grow_from_nothing_to_the_cap(allowed: Budgets, failures: int) -> None:
    pause_s = allowed.pause_s(failures)
    assert 0 <= pause_s <= allowed.max_backoff_s
    assert pause_s <= allowed.pause_s(failures + 1)
    assert failures > FREE_RESTARTS or pause_s == 0


def test_the_first_restarts_do_not_wait_and_later_ones_do() -> None:
    world = running(budgets=Budgets(3, backoff_s=2.0), standby=2, a=6, b=6)
    waited = []
    for _ in range(6):
        world.kill(world.group[0])
        begun = world.now
        go_on(world)
        waited.append(world.now - begun)
    assert waited == [1, 1, 2 + 1, 4 + 1, 8 + 1, 16 + 1]  # a second to form the group
    told = [w for w in world.warnings if "in a row without a new step" in w]
    assert told[0] == "3 failures in a row without a new step: the next try is in 2 s"
    assert len(told) == 4
    world.train()
    world.kill(world.group[0])
    begun = world.now
    go_on(world)
    assert world.now - begun == 1


def test_a_stop_does_not_wait_for_a_pause() -> None:
    world = running(budgets=Budgets(backoff_s=100.0, max_backoff_s=100.0))
    for _ in range(3):
        world.kill(world.group[0])
        world.settle()
        world.warm()
        world.settle()
    assert world.state.phase in ("fencing", "gathering")
    world.tell(v.StopAsked("enough"))
    assert world.end == v.End("stopped", Cause("stop", "enough"))


def test_the_end_names_cause_budget_and_knob() -> None:
    world = running(budgets=Budgets(2, {"crash": 1}))
    for _ in range(2):
        world.alive.pop(world.group[0])
        world.tell(v.WorkerDied(world.group[0], Cause("signal", "SIGSEGV"), world.step + 1))
        go_on(world)
    assert world.end is not None
    assert world.end.cause == Cause(
        "signal",
        f"SIGSEGV. This was number 2 of the processes that ended by themselves since step {world.step} was reached, "
        "and elastic.budgets.crash 1 allows no more than 1. Look for a crash in native code or a call of exit at this "
        "step; to try longer, raise elastic.budgets.crash and submit again.",
    )


def test_workers_that_do_not_come_up_end_a_run_only_where_it_needs_them() -> None:
    world = running(standby=1)
    world.kill(world.state.standbys[0])
    for _ in range(4):
        world.kill(world.starting[0])
    assert world.end is None
    assert world.starting == []
    assert "no more are started for 10 minutes" in world.warnings[-1]
    world.now += 599
    world.tell(v.Tick())
    assert world.starting == []
    world.now += 2
    world.tell(v.Tick())
    assert len(world.starting) == 1
    for _ in range(4):
        world.kill(world.starting[0])
    world.kill(world.group[0])  # now it is needed
    world.settle()
    assert world.starting


steps_back = st.lists(
    st.one_of(
        st.tuples(st.just("charge"), blames),
        st.tuples(st.just("commit"), st.just(1)),
        st.tuples(st.just("restore"), st.integers(0, 20)),
    ),
    max_size=80,
)


@given(steps_back)
def test_only_progress_forgives(history: list[tuple[str, object]]) -> None:
    account, step = Account(0, 0), 0
    for what, argument in history:
        before = account
        match what:
            case "charge":
                account = account.charge(argument)  # type: ignore[arg-type]  # it goes with its kind
                assert account.failures == before.failures + 1
            case "commit":
                step += 1
                account = account.commit(step)
                assert account.best_step == max(before.best_step, step)
                assert step <= before.best_step or account.failures == 0
                assert account.failures >= sum(account.lasting.values())
            case "restore":
                step = min(step, int(str(argument)))
                account = account.restore(step)
                assert account.charged == before.charged


def test_a_run_that_goes_in_circles_is_charged_for_each() -> None:
    account = Account(100, 100)
    for number in range(1, 5):
        account = account.charge("machine").restore(50)
        for step in range(51, 100):
            account = account.commit(step)
            assert account.charge("machine").commit(step + 1).charged == {"machine": number}, "those in between pass"
        assert account.charged == {"machine": number}
    assert account.commit(101).charged == {}


@pytest.mark.parametrize(
    ("cause", "to"),
    [
        (Cause("exception", "ValueError: x"), "user"),
        (Cause("exit", "exit code 1"), "crash"),
        (Cause("signal", "SIGSEGV"), "crash"),
        (KILLED, "machine"),
        (Cause("node_lost", "node a is gone"), "machine"),
        (Cause("keeper", "the keeper is gone"), "machine"),
        (Cause("unknown", "its process or its node is gone"), "machine"),
        (Cause("hang", "no progress"), "hang"),
        (Cause("corrupted", "a bit"), "corruption"),
        (Cause("oom", "SIGKILL by the kernel's OOM killer"), "memory"),
        (Cause("collective", "Connection closed by peer"), "engine"),
    ],
)
def test_who_is_to_blame(cause: Cause, to: Blame) -> None:
    assert blame(cause) == to


def test_max_failures_counts_where_nothing_else_is_said() -> None:
    config = TrainConfig.load(None, ["elastic.max_failures=2", "elastic.budgets.hang=7", "elastic.budgets.machine=0"])
    found = Budgets.of(config.elastic)
    assert [found.allowed(each) for each in ("user", "hang", "machine")] == [2, 7, 0]
    assert Budgets.of(ElasticSection()).allowed("machine") == 30
    assert list(type(config.elastic.budgets).model_fields) == list(get_args(Blame))
    assert all(a <= b for a, b in pairwise(found.pause_s(n) for n in range(20)))


def test_code_that_raises_while_workers_come_up_is_no_matter_of_budgets() -> None:
    world = World(Policy(100, plain((1, 2)), 1, Budgets(3), 10.0, 60.0), {"a": 2, "b": 2})
    while world.end is None:
        worker = world.starting.pop(0)
        del world.alive[worker]
        world.tell(v.WorkerDied(worker, Cause("exception", "ValueError: no", "...", "ValueError"), 1))
    assert world.end.cause is not None
    assert world.end.cause.kind == "exception"
    assert world.end.cause.message.endswith("in a row raised it while they came up, so it is no accident.")
    assert "elastic.budgets" not in world.end.cause.message
