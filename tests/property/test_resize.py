"""Growing when it pays, and leaving bad nodes alone without running out of good ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from elastictrain.control.resize import growth_pays, lasting_s, nodes_to_avoid

losses = st.lists(st.floats(0, 5000), max_size=50)


def test_a_second_is_worth_twice_the_speed_on_a_calm_cluster() -> None:
    assert growth_pays(1, 2, 1.0, [], now=1000.0, since=1000.0)
    assert growth_pays(63, 64, 1.0, [], now=1000.0, since=1000.0)


def test_a_small_gain_is_worth_a_pause_after_a_long_calm() -> None:
    hour_s = 3600.0
    assert not growth_pays(9992, 10_000, 1.0, [0.0], now=0.5 * hour_s, since=0.0)
    assert growth_pays(9992, 10_000, 1.0, [0.0], now=2 * hour_s, since=0.0)
    assert not growth_pays(9992, 10_000, 1.0, [1.9 * hour_s], now=2 * hour_s, since=0.0)


def test_a_flickering_market_is_not_worth_a_long_pause() -> None:
    flicker = [1000.0 - 5 * n for n in range(100)]
    assert not growth_pays(7, 8, 1.0, flicker, now=1000.0, since=0.0)
    assert growth_pays(7, 8, 1.0, flicker, now=1000.0 + 600, since=0.0)  # it has been calm since


@given(st.integers(1, 64), st.integers(1, 64), st.floats(0.01, 100), losses)
def test_the_more_is_lost_the_less_it_pays(size: int, more: int, pause_s: float, lost_at: list[float]) -> None:
    now = 5000.0
    pays = growth_pays(size, size + more, pause_s, lost_at, now, 0.0)
    assert growth_pays(size, size + more, pause_s, lost_at[1:], now, 0.0) >= pays
    assert growth_pays(size, size + more, pause_s / 2, lost_at, now, 0.0) >= pays
    assert 0 < lasting_s(lost_at, now, 0.0) <= max(600, now - max(lost_at, default=0.0))


nodes = st.dictionaries(st.text("abcd", min_size=1, max_size=2), st.integers(1, 4), min_size=1, max_size=6)


@given(nodes, st.data(), st.integers(1, 8))
def test_room_is_left_for_what_is_needed(slots: dict[str, int], data: st.DataObject, needed: int) -> None:
    failed = st.lists(st.tuples(st.floats(0, 5000), st.sampled_from([*slots, "gone"])), max_size=40)
    avoided = nodes_to_avoid(data.draw(failed), slots, needed, now=5000.0)
    assert avoided <= set(slots)
    assert not avoided or sum(n for node, n in slots.items() if node not in avoided) >= needed


def test_one_node_that_fails_again_and_again_is_avoided() -> None:
    slots = {"a": 1, "b": 1, "c": 1}
    bad = [(100.0 * n, "b") for n in range(3)]
    assert nodes_to_avoid(bad, slots, needed=2, now=300.0) == {"b"}
    assert nodes_to_avoid(bad, slots, needed=3, now=300.0) == frozenset()
    assert nodes_to_avoid(bad[:2], slots, needed=2, now=300.0) == frozenset()
    assert nodes_to_avoid(bad, slots, needed=2, now=9000.0) == frozenset()
    everywhere = [(10.0 * n, node) for n in range(9) for node in slots]
    assert nodes_to_avoid(everywhere, slots, needed=1, now=300.0) == frozenset()
