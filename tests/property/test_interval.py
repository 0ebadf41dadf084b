"""Snapshots each step if that is free, as often as it costs less than 1 % if it is not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from elastictrain.control.interval import LONGEST, SnapshotInterval


def run(interval: SnapshotInterval, copy_s: float, step_s: float, steps: int) -> float:
    """Train: a copy of `copy_s` hides behind the steps up to the next. The share of time waited in the last half."""
    waited = total = 0.0
    for number in range(steps):
        stall_s = max(0.0, copy_s - step_s * interval.every) / interval.every
        interval.step(step_s + stall_s, stall_s)
        if number > steps / 2:
            waited += stall_s
            total += step_s + stall_s
    return waited / total


@given(st.floats(0.001, 10), st.floats(0.01, 1))
def test_the_wait_comes_down_to_one_percent(copy_s: float, step_s: float) -> None:
    interval = SnapshotInterval(None)
    share = run(interval, copy_s, step_s, 20_000)
    assert share <= 0.02 or interval.every >= LONGEST / 2
    if copy_s < step_s:
        assert interval.every == 1


def test_a_choice_is_kept() -> None:
    interval = SnapshotInterval(3)
    run(interval, 10.0, 0.1, 1000)
    assert interval.every == 3


def test_it_comes_back_when_the_trouble_is_over() -> None:
    interval = SnapshotInterval(None)
    run(interval, 1.0, 0.1, 2000)
    assert interval.every > 4
    run(interval, 0.01, 0.1, 20_000)
    assert interval.every == 1
