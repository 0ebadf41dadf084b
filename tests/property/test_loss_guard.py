"""Bad steps: every one is caught, steady training never is, and a guard made from the record decides alike."""

from __future__ import annotations

import math
from statistics import median

from hypothesis import given
from hypothesis import strategies as st

from elastictrain.config import TrainSection
from elastictrain.control.loss_guard import RECENT, WINDOW, LossGuard, Seen, mean_loss, spike_limit

losses = st.floats(0.01, 20)
any_loss = losses | st.sampled_from([math.nan, math.inf, -math.inf])
ON = TrainSection(on_spike="skip", on_bad_loss="rollback")


def feed(guard: LossGuard, stream: list[float], first_step: int = 1) -> tuple[list[object], list[Seen]]:
    """What an engine would do with these losses: the verdicts, and the record."""
    verdicts, seen = [], []
    for step, loss in enumerate(stream, first_step):
        updated = math.isfinite(loss) and loss <= guard.limit
        verdicts.append(guard.judge(step, loss, updated))
        seen.append((loss, not updated))
    return verdicts, seen


@given(st.lists(any_loss, max_size=3 * WINDOW), st.integers(0, 3 * WINDOW))
def test_a_guard_made_from_the_record_decides_alike(stream: list[float], cut: int) -> None:
    verdicts, seen = feed(LossGuard(ON), stream)
    resumed, _ = feed(LossGuard(ON, seen[:cut][-WINDOW:]), stream[cut:], cut + 1)
    assert list(map(repr, resumed)) == list(map(repr, verdicts[cut:]))  # repr: NaN is NaN


@given(st.lists(any_loss, max_size=100))
def test_only_what_is_bad_is_judged(stream: list[float]) -> None:
    verdicts, seen = feed(LossGuard(TrainSection()), stream)
    assert [v is None for v in verdicts] == [math.isfinite(loss) for loss in stream]
    assert [skipped for _, skipped in seen] == [not math.isfinite(loss) for loss in stream]


@given(st.lists(losses, min_size=RECENT, max_size=WINDOW), st.floats(1, 20), st.floats(0.1, 10))
def test_the_limit_is_above_the_middle_and_scales(seen: list[float], threshold: float, scale: float) -> None:
    limit = spike_limit(seen, threshold)
    assert limit > median(seen[-RECENT:])
    assert math.isclose(spike_limit([loss * scale for loss in seen], threshold), limit * scale, rel_tol=1e-9)
    assert spike_limit(seen, 2 * threshold) > limit


@given(st.lists(losses, min_size=2 * RECENT, max_size=WINDOW), st.sets(st.integers(0, 2 * RECENT - 1), max_size=5))
def test_a_few_outliers_hardly_move_the_limit(seen: list[float], outliers: set[int]) -> None:
    limit = spike_limit([1e6 if i in outliers else loss for i, loss in enumerate(seen)], 8.0)
    assert limit <= max(seen) + 8 * max(1.05 * (max(seen) - min(seen)), 0.01 * max(seen)) + 1e-9


@given(st.floats(0.5, 10), st.integers(0, 99))
def test_a_spike_in_steady_training_is_the_only_verdict(level: float, seed: int) -> None:
    steady = [level * (1 + 0.02 * math.sin(seed + 1.7 * step)) * math.exp(-step / 30) for step in range(40)]
    *calm, verdict = feed(LossGuard(ON), [*steady, 2 * steady[-1]])[0]
    assert calm == [None] * 40
    assert verdict is not None
    assert (verdict.reason, verdict.action, verdict.step) == ("spike", "skip", 41)


def test_the_first_steps_are_no_spikes() -> None:
    assert spike_limit([1.0] * (RECENT - 1), 8.0) == math.inf
    assert spike_limit([1.0] * RECENT, 8.0) == 1.08


def test_a_loss_that_stays_high_stops_the_run() -> None:
    train = TrainSection(on_spike="skip", max_bad_steps=3)
    verdicts, _ = feed(LossGuard(train), [1.0] * 20 + [9.0] * 3)
    assert [v and v.action for v in verdicts[20:]] == ["skip", "skip", "stop"]
    assert "the last of 3 bad steps in a row (train.max_bad_steps 3)" in verdicts[-1].message


def test_a_gradient_can_be_bad_alone() -> None:
    verdict = LossGuard(TrainSection(on_bad_loss="stop")).judge(7, 2.5, updated=False)
    assert verdict is not None
    assert (verdict.reason, verdict.action) == ("gradient", "stop")
    for text in ("gradient of step 7", "train.on_bad_loss: stop", "after step 6", "train.on_bad_loss=skip"):
        assert text in verdict.message


@given(st.lists(any_loss, min_size=1, max_size=20), st.randoms())
def test_the_mean_has_no_order(values: list[float], random: st.DataObject) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)
    assert repr(mean_loss(shuffled)) == repr(mean_loss(values))
    assert math.isfinite(mean_loss(values)) == all(map(math.isfinite, values))


def test_an_overflow_of_fp16_is_skipped_whatever_the_policy() -> None:
    train = TrainSection(dtype="fp16", on_bad_loss="rollback", max_bad_steps=3)
    guard = LossGuard(train)
    verdicts = [guard.judge(step, 2.5, updated=False) for step in (1, 2, 3)]
    assert [verdict and verdict.action for verdict in verdicts] == ["skip", "skip", "stop"]
    verdict = LossGuard(train).judge(1, math.nan, updated=False)
    assert verdict is not None
    assert (verdict.reason, verdict.action) == ("loss", "rollback")
