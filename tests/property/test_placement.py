"""Where workers are started, who gets which rank, and which state in memory is chosen, whatever the cluster."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from elastictrain.control.placement import assign_ranks, crowded, seat_together, wanted_workers
from elastictrain.control.restore import ShardAt, newest_complete, ring


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


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.integers(1, 4))
def test_as_many_blocks_as_can_be_have_one_node(places: list[str], size: int) -> None:
    places = places[: len(places) // size * size]
    nodes = {f"w{number}": node for number, node in enumerate(places)}
    ranks = seat_together([*nodes], nodes, size)
    assert sorted(ranks) == sorted(nodes)
    blocks = [[nodes[name] for name in ranks[start : start + size]] for start in range(0, len(ranks), size)]
    assert sum(len(set(block)) == 1 for block in blocks) == sum(n // size for n in Counter(places).values())
    assert seat_together(ranks, nodes, size) == ranks, "nothing moves for nothing"


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
