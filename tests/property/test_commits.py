"""Steps are put together from ranks' records, whatever the order, the layout and the failures between them."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.data.order import EMPTY_CHAIN, SampleOrder
from elastictrain.events import StepCommitted, Waits
from elastictrain.plan.layout import plan_layout
from elastictrain.runtime.commits import CommitCollector
from elastictrain.runtime.protocol import StepRecord, pack_records, unpack_records
from elastictrain.state.tensors import ShardHeader

GLOBAL_BATCH, MICRO_BATCH = 12, 1
ORDER = SampleOrder(50, seed=3)


def record(step: int, world_size: int, rank: int) -> StepRecord:
    layout = plan_layout(world_size, global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, zero_stage=1)
    batches = ORDER.micro_batches(step, layout, rank)
    losses = tuple((m.global_index, 1.0 / (1 + step * 31 + m.global_index), m.samples) for m in batches)
    return StepRecord(
        step, losses, 10, 100.0 + step, 100.5 + step + rank, 0.1, 1.0, 0.001 * rank, 0.002, 0.1 * (rank + 1)
    )


def header(generation: int, step: int, world_size: int, rank: int, every: int = 1) -> ShardHeader:
    records = [record(s, world_size, rank) for s in range(step - every + 1, step + 1)]
    return ShardHeader(generation, step, rank, world_size, "", {}, pack_records(records))


def run(plan: list[tuple[int, int]], seed: int = 0) -> list[StepCommitted]:
    """Generations of (world size, steps), told in a shuffled order of ranks, with a late echo of older ones."""
    shuffle = random.Random(seed)
    collector = CommitCollector(0, EMPTY_CHAIN)
    told: list[StepCommitted] = []
    step = 0
    for generation, (world_size, steps) in enumerate(plan):
        collector.begin(generation, world_size, step)
        for _ in range(steps):
            step += 1
            headers = [header(generation, step, world_size, rank) for rank in range(world_size)]
            shuffle.shuffle(headers)
            for h in [*headers, shuffle.choice(headers)]:
                told += collector.add(h, 0.0)
            assert not collector.add(header(generation - 1, step + 1, 1, 0), 0.0)
    return told


plans = st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6]), st.integers(0, 5)), max_size=6)


@settings(deadline=None)
@given(plans, st.integers(0, 99))
def test_the_story_does_not_depend_on_layouts_or_order(plan: list[tuple[int, int]], seed: int) -> None:
    told = run(plan, seed)
    alone = run([(1, len(told))])
    assert [e.step for e in told] == list(range(1, len(told) + 1))
    assert [(e.loss, e.sample_chain, e.num_samples) for e in told] == [
        (e.loss, e.sample_chain, e.num_samples) for e in alone
    ]


def test_a_step_counts_only_when_every_rank_has_it() -> None:
    collector = CommitCollector(0, EMPTY_CHAIN)
    collector.begin(0, 2, 0)
    assert collector.add(header(0, 1, 2, 0), 0.0) == []
    (event,) = collector.add(header(0, 1, 2, 1), 5.0)
    assert (event.step, event.at, event.num_samples) == (1, 5.0, GLOBAL_BATCH)
    assert event.begun_at == 101.0
    assert event.finished_at == 102.5
    assert event.waits == Waits(data_s=0.0005, peers_s=(0.1 * 1 + 0.1 * 2) / 2, snapshot_s=0.002)


def test_snapshots_every_few_steps_bring_all_their_steps() -> None:
    collector = CommitCollector(0, EMPTY_CHAIN)
    collector.begin(0, 2, 0)
    collector.add(header(0, 3, 2, 1, every=3), 0.0)
    events = collector.add(header(0, 3, 2, 0, every=3), 0.0)
    assert [e.step for e in events] == [1, 2, 3]


def test_the_newest_may_be_told_first() -> None:
    collector = CommitCollector(0, EMPTY_CHAIN)
    collector.begin(0, 2, 0)
    for step, rank in ((2, 0), (2, 1), (1, 1)):
        assert collector.add(header(0, step, 2, rank), 0.0) == []
    events = collector.add(header(0, 1, 2, 0), 0.0)
    assert [e.step for e in events] == [1, 2]


def test_records_survive_the_journey() -> None:
    records = [record(4, 2, 1), record(5, 2, 1)]
    assert unpack_records(pack_records(records)) == records
    assert unpack_records("") == []
