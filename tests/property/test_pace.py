"""Windows of steps: every step is told of once, few events for long runs, and the means are right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.events import RanksTimed
from elastictrain.runtime.pace import Pace


def paced(generations: list[tuple[int, int, float]]) -> list[RanksTimed]:
    """Generations of (ranks, steps, seconds a step); rank r works r + 1 hundredths longer each step."""
    pace, told, step, at = Pace(), list[RanksTimed](), 0, 1000.0
    for generation, (ranks, steps, step_s) in enumerate(generations):
        for _ in range(steps):
            step, begun_at, at = step + 1, at, at + step_s
            pace.step(generation, step, begun_at, at, [0.01 * (rank + 1) for rank in range(ranks)])
            told += pace.take()
    pace.close()
    return told + pace.take()


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 60), st.floats(0, 3)), max_size=5))
def test_every_step_is_in_one_window_of_its_generation(generations: list[tuple[int, int, float]]) -> None:
    windows = paced(generations)
    steps = [step for w in windows for step in range(w.first_step, w.last_step + 1)]
    assert steps == list(range(1, sum(steps for _, steps, _ in generations) + 1))
    for window in windows:
        ranks = generations[window.generation][0]
        assert window.own_s == pytest.approx([0.01 * (rank + 1) for rank in range(ranks)])


def test_a_day_of_steps_is_told_in_a_few_hundred_windows() -> None:
    assert len(paced([(2, 86_400 * 2, 0.5)])) < 1000


def test_a_short_run_has_a_window_every_two_seconds() -> None:
    assert [(w.first_step, w.last_step) for w in paced([(1, 12, 0.5)])] == [(1, 4), (5, 8), (9, 12)]
