"""Whatever the journal says, in whatever order: no bucket is negative, and their sum is the wall time."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import example, given

from elastictrain.events import (
    Cause,
    CheckpointWritten,
    Evaluated,
    Event,
    FailureDetected,
    GenerationStarted,
    Recovered,
    RunEnded,
    RunStarted,
    StepCommitted,
)
from elastictrain.tracking.committed import committed_steps
from elastictrain.tracking.ledger import BUCKETS, goodput
from elastictrain.tracking.report import build_report

BEGINNING = 1_790_000_000.0
times = st.floats(0, 1000).map(lambda t: BEGINNING + t)
spans_s = st.floats(0, 50)
small = st.integers(1, 5)

run_started = st.builds(
    RunStarted, at=times, run=st.just("r"), attempt=small, config=st.just({}), environment=st.just({})
)
events = st.one_of(
    run_started,
    st.builds(
        GenerationStarted,
        at=times,
        index=small,
        layout=st.just({}),
        world_size=small,
        first_step=small,
        cause=st.just("start"),
        source=st.just("memory"),
        continuation=st.just("bit_exact"),
        members=st.just(()),
    ),
    st.builds(
        StepCommitted,
        at=times,
        generation=small,
        step=small,
        loss=st.floats(),
        sample_chain=st.just(""),
        num_samples=small,
        num_tokens=small,
        begun_at=times,
        finished_at=times,
        learning_rate=st.just(0.1),
        grad_norm=st.just(1.0),
        data_wait_s=spans_s,
        snapshot_stall_s=spans_s,
    ),
    st.builds(
        FailureDetected,
        at=times,
        detected_at=times,
        generation=small,
        kind=st.just("worker_lost"),
        ranks=st.just((0,)),
        node=st.just(""),
        pid=st.just(1),
        cause=st.just(Cause("signal", "SIGKILL")),
        step=small,
    ),
    st.builds(
        Recovered,
        at=times,
        generation=small,
        first_step=small,
        lost_steps=small,
        source=st.just("memory"),
        continuation=st.just("bit_exact"),
    ),
    st.builds(
        CheckpointWritten,
        at=times,
        step=small,
        uri=st.just("u"),
        num_bytes=small,
        sha256=st.just(""),
        seconds=spans_s,
        stall_s=spans_s,
        samples=small,
        sample_chain=st.just(""),
        loss=st.just(1.0),
        layout=st.just({}),
    ),
    st.builds(
        Evaluated,
        at=times,
        step=small,
        loss=st.just(1.0),
        bits_per_byte=st.just(1.0),
        gzip_bits_per_byte=st.just(1.0),
        num_bytes=small,
        sample=st.just(""),
    ),
    st.builds(RunEnded, at=times, status=st.sampled_from(["complete", "stopped", "failed"]), step=small),
)
journals = st.lists(events, max_size=40)


@given(journals, st.none() | times)
@example([], None)
def test_buckets_are_not_negative_and_sum_to_the_wall_time(journal: list[Event], now: float | None) -> None:
    ledger = goodput(journal, now)
    assert set(ledger.seconds) == set(BUCKETS)
    assert all(seconds >= 0 for seconds in ledger.seconds.values())
    assert abs(sum(ledger.seconds.values()) - ledger.wall_s) <= 1e-6
    assert 0 <= ledger.ratio <= 1


@given(journals)
def test_standing_steps_ascend_and_none_is_told_twice(journal: list[Event]) -> None:
    folded = committed_steps(journal)
    steps = [s.step for s in folded.standing]
    assert steps == sorted(set(steps))
    told = [e for e in journal if isinstance(e, StepCommitted)]
    assert sorted(map(id, told)) == sorted(map(id, folded.standing + folded.undone))


@given(run_started, journals)
def test_any_journal_has_a_report(start: RunStarted, journal: list[Event]) -> None:
    report = build_report([start, *journal])
    assert report["lost_steps"] >= 0
    assert len(report["failures"]) == sum(isinstance(e, FailureDetected) for e in journal)
