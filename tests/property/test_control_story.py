"""The state machine in the stories that users live through, one by one."""

from __future__ import annotations

from world import World, plain, running

from elastictrain.control import vocabulary as v
from elastictrain.control.budget import Budgets
from elastictrain.control.state import Policy
from elastictrain.events import Cause


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
    policy = Policy(100, plain((1, 2)), 1, Budgets(3), 10.0, 60.0, unreserved_standby=True)
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
