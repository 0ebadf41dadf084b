"""Preemption notices: who has one leaves at a step boundary before its deadline, and nothing counts as a failure."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from world import KILLED, World, plain, running

from elastictrain.control import vocabulary as v
from elastictrain.control.budget import Budgets
from elastictrain.control.state import Policy

GRACE_S = 60.0


def calm(world: World, until: Callable[[], bool], patience_s: float = GRACE_S) -> None:
    """Nothing else happens; a step takes 2 s, a worker comes up in as long, and no step is lost."""
    deadline = world.now + patience_s
    while not until():
        assert world.now < deadline
        assert world.end is None
        world.settle()
        world.warm()
        world.train()
        world.now += 2
        if world.end is None:
            world.tell(v.Tick())


def formed_without(world: World, *workers: str) -> bool:
    return bool(world.group) and not set(workers) & set(world.group)


def test_a_warm_standby_takes_over_at_once() -> None:
    world = running()
    kept, leaver = world.group
    [standby] = world.state.standbys
    world.ask_to_leave(leaver)
    assert world.pausing
    assert "standbys take over" in world.warnings[-1]
    assert not world.starting  # the next standby does not delay this
    calm(world, lambda: formed_without(world, leaver), patience_s=6)
    assert world.group == (kept, standby)
    assert world.state.cause == f"{leaver} leaves: SIGTERM"
    assert leaver not in world.alive


def test_without_a_standby_it_trains_on_until_its_replacement_is_warm() -> None:
    world = running(world_sizes=(2,), standby=0, a=1, b=1)  # no slot is free before it leaves
    leaver = world.group[1]
    world.ask_to_leave(leaver)
    assert len(world.starting) == 1
    assert not world.pausing
    assert "replacement is started" in world.warnings[-1]
    world.train()
    world.warm()
    assert world.pausing
    calm(world, lambda: formed_without(world, leaver), patience_s=6)


def test_without_room_it_is_parted_with_before_the_deadline_and_the_run_goes_on_smaller() -> None:
    world = running(standby=0, a=1, b=1)
    left_at = world.now + GRACE_S
    leaver = world.group[1]
    world.drain("b", GRACE_S)
    assert "no room for a replacement" in world.warnings[-1]
    calm(world, lambda: formed_without(world, leaver))
    assert left_at - 20 < world.now < left_at - 4
    assert len(world.group) == 1
    calm(world, lambda: not world.drained, patience_s=6)  # the node is given up once the others have the state
    world.tell(v.NodesJoined({"c": 1}))
    calm(world, lambda: len(world.group) == 2)


def test_a_node_that_joins_in_time_replaces_the_drained_one() -> None:
    world = running(standby=0, a=1, b=1)
    leaver = world.group[1]
    world.drain("b", GRACE_S)
    world.tell(v.NodesJoined({"c": 1}))
    calm(world, lambda: formed_without(world, leaver), patience_s=12)
    assert len(world.group) == 2
    assert world.alive[world.group[1]] == "c"


def test_below_min_workers_the_state_is_saved_before_the_deadline_and_the_run_waits() -> None:
    world = running(world_sizes=(2,), standby=0, a=1, b=1)
    left_at = world.now + GRACE_S
    world.drain("b", GRACE_S)
    calm(world, lambda: "made durable" in world.warnings[-1])
    assert world.now < left_at - 4
    assert world.state.phase == "gathering"
    world.lose_node("b")
    assert world.state.phase == "fencing", "what was in its memory is looked for elsewhere"
    world.tell(v.NodesJoined({"c": 1}))
    calm(world, lambda: len(world.group) == 2)


def test_a_drained_node_is_not_used_again() -> None:
    world = running(a=2, b=2)
    world.drain("b", GRACE_S)
    calm(world, lambda: bool(world.group) and "b" not in {world.alive[w] for w in world.group})
    assert all(node == "a" for node in world.alive.values())


def test_a_standby_that_leaves_is_replaced_and_disturbs_nobody() -> None:
    world = running()
    generation = world.state.generation
    [standby] = world.state.standbys
    world.ask_to_leave(standby)
    assert standby not in world.alive
    assert len(world.starting) == 1
    calm(world, lambda: bool(world.state.standbys), patience_s=6)
    assert world.state.generation == generation


def test_a_step_that_takes_longer_than_the_margin_ends_in_time_too() -> None:
    world = running(standby=0, steps=1000, a=1, b=1)
    for _ in range(200):
        world.train()
        world.now += 20
    world.drain("b", grace_s=45)
    assert world.pausing, "two steps and the margin are more than is left"


@given(
    st.sampled_from([(1,), (2,), (1, 2), (1, 2, 3, 4)]),
    st.integers(0, 2),
    st.dictionaries(st.sampled_from("abc"), st.integers(1, 3), min_size=1),
    st.sampled_from(["leave", "drain"]),
    st.integers(0, 9),
    st.booleans(),
)
def test_whoever_has_notice_is_gone_before_the_deadline_and_nothing_is_charged(
    world_sizes: tuple[int, ...], standby: int, nodes: dict[str, int], how: str, pick: int, unreserved: bool
) -> None:
    policy = Policy(1000, plain(world_sizes), standby, Budgets(0), 10.0, 600.0, unreserved_standby=unreserved)
    world = World(policy, nodes)
    for _ in range(30):
        world.settle()
        world.warm()
        world.train()
    if not world.group:
        return  # no room for the smallest world
    step, deadline = world.committed, world.now + GRACE_S
    if how == "leave":
        world.ask_to_leave(sorted(world.alive)[pick % len(world.alive)], GRACE_S)
    else:
        world.drain(sorted(world.state.nodes)[pick % len(world.state.nodes)], GRACE_S)
    calm(world, lambda: not world.leaving & world.alive.keys())
    assert world.now < deadline
    assert world.committed >= step
    assert world.state.account.failures == 0
    if sum(world.state.nodes.values()) >= world_sizes[0]:
        calm(world, lambda: formed_without(world, *world.leaving) and world.committed > step)


@pytest.mark.parametrize("kept", [True, False])
def test_a_second_notice_counts_where_it_is_earlier(kept: bool) -> None:
    world = running(standby=0, a=1, b=1)
    leaver = world.group[1]
    world.ask_to_leave(leaver, 100)
    world.drain("b", 200 if kept else 50)
    notice = world.state.workers[leaver].notice
    assert notice is not None
    assert notice.deadline == world.now + (100 if kept else 50)


def test_one_that_dies_before_it_could_leave_is_a_failure_as_any() -> None:
    world = running(standby=0, a=1, b=1)
    world.ask_to_leave(world.group[1])
    world.kill(world.group[1])
    assert world.state.account.failures == 1
    assert world.state.cause == KILLED.message


def test_slots_that_are_taken_away_are_given_up_at_a_step_boundary_and_taken_back_when_they_return() -> None:
    world = running(world_sizes=(1, 2, 3, 4), standby=0, a=2, b=2)
    group = world.group
    assert len(group) == 4
    on_a = [name for name in group if world.alive[name] == "a"]
    world.tell(v.NodesJoined({"a": 1}))
    assert world.pausing, "at once, but between two steps"
    calm(world, lambda: formed_without(world, on_a[1]), patience_s=6)
    assert world.group == tuple(name for name in group if name != on_a[1]), "the lowest ranks stay"
    assert on_a[1] not in world.alive
    assert world.state.account.failures == 0, "nothing has failed"
    world.tell(v.NodesJoined({"a": 2}))
    calm(world, lambda: len(world.group) == 4)


def test_a_run_that_waits_gives_up_what_holds_no_rank() -> None:
    world = running(world_sizes=(1, 2), standby=0, a=3)
    group = world.group
    world.tell(v.NodesJoined({"a": 2}))
    assert world.group == group
    assert not world.pausing
