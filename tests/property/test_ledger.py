"""Whatever the journal says, in whatever order: no bucket is negative, and their sum is the wall time."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

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
    SlotsHeld,
    StepCommitted,
    Waits,
)
from elastictrain.tracking.attempts import split_attempts
from elastictrain.tracking.committed import committed_steps
from elastictrain.tracking.ledger import BUCKETS, goodput, over_time, total
from elastictrain.tracking.report import build_report

BEGINNING = 1_790_000_000.0
times = st.floats(0, 1000).map(lambda t: BEGINNING + t)
spans_s = st.floats(0, 50)
waits_s = st.floats(0, 50) | st.floats(-1, 1e9)
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
        waits=st.none() | st.builds(Waits, data_s=waits_s, peers_s=waits_s, snapshot_s=waits_s),
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
    st.builds(SlotsHeld, at=times, slots=st.integers(0, 7)),
    st.builds(RunEnded, at=times, status=st.sampled_from(["complete", "stopped", "failed"]), step=small),
)
journals = st.lists(events, max_size=40)


def us(at: float) -> int:
    return round(at * 1_000_000)


def wall(journal: list[Event], now: float | None) -> tuple[int, int]:
    """Begin and end of the run, in microseconds."""
    attempts = split_attempts(journal, now)
    return (us(attempts[0].begun_at), us(max(a.ended_at for a in attempts))) if attempts else (0, 0)


def workers_us(journal: list[Event], begun: int, ended: int) -> int:
    """Wall time times workers, generation by generation."""
    told = [(us(e.at), e.index, e.world_size) for e in journal if isinstance(e, GenerationStarted)]
    generations = sorted(told)
    if not generations:
        return 0
    starts = [begun, *(min(max(at, begun), ended) for at, _, _ in generations[1:]), ended]
    return sum((stop - start) * size for start, stop, (_, _, size) in zip(starts, starts[1:], generations))


def spare_us(journal: list[Event], now: float | None) -> int:
    """Slots beyond the ranks, times the time for which they were held while somebody ran the run."""
    attempts = split_attempts(journal, now)
    begun, ended = wall(journal, now)
    told = [e for e in journal if isinstance(e, RunStarted | SlotsHeld)]
    held = [(us(e.at), number, getattr(e, "slots", 0)) for number, e in enumerate(told)]
    ranks = sorted((us(e.at), e.index, e.world_size) for e in journal if isinstance(e, GenerationStarted))
    down = [(us(a.ended_at), us(b.begun_at)) for a, b in pairwise(attempts)]
    times_us = [at for at, *_ in (*held, *ranks, *down)] + [at for _, at in down]
    cuts = sorted({begun, ended, *(at for at in times_us if begun < at < ended)})
    total_us = 0
    for start, stop in pairwise(cuts):
        *_, slots = max((h for h in held if h[0] <= start), default=(0, 0, 0))
        size = next((s for at, _, s in reversed(ranks) if at <= start), ranks[0][2] if ranks else 0)
        if not any(a <= start < b for a, b in down):
            total_us += (stop - start) * max(slots - size, 0)
    return total_us


@given(journals, st.none() | times)
@example([], None)
def test_every_second_of_every_worker_is_in_one_bucket(journal: list[Event], now: float | None) -> None:
    ledger = goodput(journal, now)
    begun, ended = wall(journal, now)
    for counted, whole in (
        (ledger.run_us, ended - begun),
        (ledger.workers_us, workers_us(journal, begun, ended) + spare_us(journal, now)),
    ):
        assert set(counted) == set(BUCKETS)
        assert all(isinstance(microseconds, int) and microseconds >= 0 for microseconds in counted.values())
        assert sum(counted.values()) == whole
    assert 0 <= ledger.ratio <= 1
    assert (ledger.run_us["spare"], ledger.workers_us["spare"]) == (0, spare_us(journal, now))


def steps_as_one(counted: Mapping[str, int]) -> dict[str, int]:
    """What steps are divided into is rounded piece by piece; their sum is not."""
    divided = ("compute", "communication", "data_wait", "snapshot_stall", "checkpoint_stall")
    return {b: us for b, us in counted.items() if b not in divided} | {"steps": sum(counted[b] for b in divided)}


@given(journals, st.none() | times, st.integers(1, 50))
def test_the_parts_of_the_time_sum_to_the_whole(journal: list[Event], now: float | None, parts: int) -> None:
    split = over_time(journal, parts, now)
    assert len(split) == parts
    together, whole = total(split), goodput(journal, now)
    assert steps_as_one(together.run_us) == steps_as_one(whole.run_us)
    assert steps_as_one(together.workers_us) == steps_as_one(whole.workers_us)
    sums = [sum(part.run_us.values()) for part in split]
    assert max(sums) - min(sums) <= 1


@given(journals)
def test_standing_steps_ascend_and_none_is_told_twice(journal: list[Event]) -> None:
    folded = committed_steps(journal)
    steps = [s.step for s in folded.standing]
    assert steps == sorted(set(steps))
    told = [e for e in journal if isinstance(e, StepCommitted)]
    assert sorted(map(id, told)) == sorted(map(id, [*folded.standing, *folded.undone]))


@given(run_started, journals)
def test_any_journal_has_a_report(start: RunStarted, journal: list[Event]) -> None:
    report = build_report([start, *journal])
    assert report["lost_steps"] >= 0
    assert len(report["failures"]) == sum(isinstance(e, FailureDetected) for e in journal)
