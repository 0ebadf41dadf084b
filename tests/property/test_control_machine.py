"""The state machine under random clusters: kills, node losses, joins, raised errors and slow answers in any order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from world import World, moves, play, policies

from elastictrain.control import vocabulary as v
from elastictrain.control.state import Policy


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
