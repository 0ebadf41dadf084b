"""The learning rate over a run."""

from __future__ import annotations

import pytest

from elastictrain.config import TrainSection
from elastictrain.engine.schedule import learning_rate


def test_it_warms_up_to_the_peak_and_falls_to_the_minimum_at_the_last_step() -> None:
    train = TrainSection(steps=100, warmup_steps=10, learning_rate=1e-2, min_learning_rate=1e-3)
    rates = [learning_rate(train, step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[9] == 1e-2 == max(rates)
    assert rates[-1] == pytest.approx(1e-3)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[54] == pytest.approx((1e-2 + 1e-3) / 2)  # half way down the cosine


def test_without_a_warm_up_the_first_step_is_already_on_the_cosine() -> None:
    train = TrainSection(steps=10, warmup_steps=0, learning_rate=1e-2, min_learning_rate=0)
    assert 0.9e-2 < learning_rate(train, 1) < 1e-2
    assert learning_rate(train, 10) == 0


def test_a_run_shorter_than_its_warm_up_never_divides_by_zero() -> None:
    train = TrainSection(steps=5, warmup_steps=20, learning_rate=1e-2, min_learning_rate=0)
    assert [learning_rate(train, step) for step in (1, 5)] == pytest.approx([2e-3, 1e-2])


def test_steps_count_from_one() -> None:
    with pytest.raises(ValueError, match="first step is 1"):
        learning_rate(TrainSection(), 0)
