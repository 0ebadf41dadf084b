"""A driver dies anywhere: what its keepers hold goes on where its journal ends, every step once, or is left alone."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.control.restore import ShardAt, complete_states
from elastictrain.data.order import EMPTY_CHAIN, SampleOrder
from elastictrain.events import Event, GenerationStarted, StepCommitted
from elastictrain.plan.layout import plan_layout
from elastictrain.runtime.commits import CommitCollector
from elastictrain.runtime.inherit import Heir, find_heir
from elastictrain.runtime.protocol import StepRecord, pack_records
from elastictrain.state.tensors import ShardHeader
from elastictrain.tracking.committed import committed_steps

GLOBAL_BATCH = 12
ORDER = SampleOrder(50, seed=3)
EVER = 10**6


def record(generation: int, step: int, world_size: int, rank: int) -> StepRecord:
    """A step done again by another generation has another loss here, so that the two can be told apart."""
    layout = plan_layout(world_size, global_batch=GLOBAL_BATCH, micro_batch=1, zero_stage=1)
    batches = ORDER.micro_batches(step, layout, rank)
    losses = tuple((m.global_index, generation + 1.0 / (1 + step * 31 + m.global_index), m.samples) for m in batches)
    return StepRecord(step, losses, 10, 100.0 + step, 100.5 + step, 0.1, 1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Era:
    """A generation: how many steps before the end of the one before it begins, and how it goes on."""

    world_size: int
    back: int
    steps: int
    every: int
    """Steps between snapshots."""


class History:
    """The whole truth: the journal as a driver that never dies would write it, and all snapshots ever made."""

    def __init__(self, eras: list[Era]) -> None:
        self.journal: list[Event] = []
        self.snapshots: list[list[ShardHeader]] = []
        step, chains = 0, {0: EMPTY_CHAIN}
        for generation, era in enumerate(eras):
            step = max(0, step - era.back)
            started = GenerationStarted(0.0, generation, {}, era.world_size, step + 1, "", "memory", "bit_exact", ())
            self.journal.append(started)
            collector = CommitCollector(step, chains[step])
            collector.begin(generation, era.world_size, step)
            for _ in range(era.steps):
                steps = range(step + 1, step + era.every + 1)
                step += era.every
                headers = []
                for rank in range(era.world_size):
                    note = pack_records([record(generation, s, era.world_size, rank) for s in steps])
                    headers.append(ShardHeader(generation, step, rank, era.world_size, "", {}, note))
                    for event in collector.add(headers[-1], 0.0):
                        self.journal.append(event)
                        chains[event.step] = event.sample_chain
                self.snapshots.append(headers)


eras = st.lists(
    st.builds(Era, st.sampled_from([1, 2, 3]), st.integers(0, 3), st.integers(0, 4), st.integers(1, 3)),
    min_size=1,
    max_size=4,
)


def inherit(told: list[Event], held: list[ShardHeader], known: list[ShardHeader], before: int = EVER) -> Heir | None:
    states = complete_states(ShardAt(h.generation, h.step, h.rank, h.world_size, "a") for h in held)
    return find_heir(told, states, [*known, *held], before)


@settings(deadline=None, max_examples=200)
@given(eras, st.data())
def test_what_goes_on_is_the_truth_and_each_step_is_told_once(plan: list[Era], data: st.DataObject) -> None:
    """The journal may lack any part of its end, memory anything: what is found continues it, or nothing is."""
    history = History(plan)
    told = history.journal[: data.draw(st.integers(0, len(history.journal)), label="journalled")]
    every = [header for headers in history.snapshots for header in headers]
    chance = random.Random(data.draw(st.integers(0, 99), label="losses"))
    keep = data.draw(st.sampled_from([0.3, 0.9, 1.0]), label="kept")
    held, known = ([h for h in every if chance.random() < keep] for _ in range(2))
    before = data.draw(st.sampled_from([EVER, 5]), label="before")
    heir = inherit(told, held, known, before)
    if heir is None:
        return
    assert heir.state.step < before
    standing = committed_steps(told).standing
    assert [e.step for e in heir.untold] == list(range(len(standing) + 1, len(standing) + len(heir.untold) + 1))
    timeline = [*standing, *heir.untold][: heir.state.step]
    assert [e.step for e in timeline] == list(range(1, heir.state.step + 1))
    assert timeline[-1].generation == heir.state.generation

    truth = {(e.generation, e.step): e for e in history.journal if isinstance(e, StepCommitted)}
    for event in heir.untold:
        true = truth[event.generation, event.step]
        assert (event.loss, event.sample_chain, event.at) == (true.loss, true.sample_chain, event.finished_at)
    # as if the driver had lived to write it down: nothing of it is taken back by what the journal says already
    assert committed_steps([*told, *heir.untold]).standing[: heir.state.step] == tuple(timeline)


@settings(deadline=None)
@given(eras, st.integers(0, 9))
def test_the_newest_snapshot_counts_however_far_the_journal_lags(plan: list[Era], lag: int) -> None:
    history = History([*plan, Era(2, 1, 3, 2)])
    start = max(i for i, event in enumerate(history.journal) if isinstance(event, GenerationStarted))
    told = history.journal[: max(start + 1, len(history.journal) - lag)]
    recorded = max((e.step for e in committed_steps(told).standing), default=0)
    newest = history.snapshots[-1]
    known = [h for headers in history.snapshots for h in headers if h.step > recorded]
    heir = inherit(told, [*history.snapshots[-2], *newest], known)
    assert heir is not None
    assert (heir.state.generation, heir.state.step) == (newest[0].generation, newest[0].step)
    assert len(heir.untold) == heir.state.step - recorded


def test_a_state_that_was_taken_back_is_left_alone() -> None:
    """A generation went on from before it, for reasons that the journal need not know, such as corrupted memory."""
    history = History([Era(2, 0, 5, 1), Era(2, 2, 0, 1)])
    old = [header for headers in history.snapshots[-2:] for header in headers]  # of steps 4 and 5
    assert inherit(history.journal, old, []) is None
    third = history.snapshots[2]
    heir = inherit(history.journal, [*third, *old], [])
    assert heir is not None
    assert heir.state.step == 3


def test_records_that_do_not_give_the_step_on_record_are_not_believed() -> None:
    history = History([Era(2, 0, 3, 1)])
    newest = history.snapshots[-1]
    foreign = History([Era(2, 0, 0, 1), Era(2, 0, 3, 1)]).snapshots[-1]
    same = [ShardHeader(0, h.step, h.rank, h.world_size, "", {}, h.note) for h in foreign]
    assert inherit(history.journal, newest, []) is not None
    assert inherit(history.journal, same, []) is None
