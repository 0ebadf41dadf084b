"""From where a run goes on: which checkpoint, by the record's word, the journal's and that of the steps themselves; and
when the memory that a dead driver left comes first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from elastictrain.checkpoint.arena import ArenaTicket
from elastictrain.checkpoint.store import CheckpointStore, StoredCheckpoint
from elastictrain.checkpoint.vault import StoredShard
from elastictrain.config import TrainConfig
from elastictrain.data.order import EMPTY_CHAIN
from elastictrain.errors import CheckpointError
from elastictrain.events import (
    Cause,
    CheckpointRejected,
    CheckpointRemoved,
    CheckpointWritten,
    Event,
    FailureDetected,
    FaultInjected,
    GenerationStarted,
    RunEnded,
    RunStarted,
    StepCommitted,
    Warned,
)
from elastictrain.runtime.commits import CommitCollector
from elastictrain.runtime.durable import as_written
from elastictrain.runtime.estate import Estate
from elastictrain.runtime.protocol import Bequest, FaultAnnounced, StepRecord, WorkerExited, pack_records
from elastictrain.runtime.resume import StartPoint, newest_usable, start_point
from elastictrain.state.manifest import Manifest
from elastictrain.state.tensors import Fragment, LogicalTensor, ShardHeader, ShardIndex
from elastictrain.storage import Storage

Write = Callable[..., StoredCheckpoint]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(Storage.open(str(tmp_path)).run("demo"))


@pytest.fixture
def write(store: CheckpointStore) -> Write:
    """Writes the checkpoint of a step whose loss is its number."""

    def write(step: int, event: StepCommitted | None = None) -> StoredCheckpoint:
        index = ShardIndex((Fragment("param/w", 0, 2),))
        shard = store.write_shard(step, 0, 1, index, bytes(8))
        tensors = (LogicalTensor("param/w", (2,)),)
        loss, chain = float(step), event.sample_chain if event else f"{step:064x}"
        return store.commit(Manifest("demo", step, step * 4, chain, loss, {"dp": 1}, {}, tensors, (shard,), 1e9))

    return write


def journal(*told: StoredCheckpoint, steps: int = 9) -> list[Event]:
    """Of a run that came to step `steps` and told of these checkpoints."""
    generation = GenerationStarted(0.0, 0, {}, 1, 1, "start", "fresh", "bit_exact", (), {})
    committed = [
        StepCommitted(1.0, 0, step, float(step), f"{step:064x}", 4, 9, 0.0, 1.0, 1e-3, 1.0, 0.0, 0.0)
        for step in range(1, steps + 1)
    ]
    return [generation, *committed, *(as_written(stored, 1.0) for stored in told)]


def test_one_that_nobody_lived_to_tell_of_is_used_and_told(store: CheckpointStore, write: Write) -> None:
    told, untold = write(3), write(6)
    emitted: list[Event] = []
    assert newest_usable(journal(told), {3: told.sha256}, store, emitted.append) == untold
    [event] = emitted
    assert isinstance(event, CheckpointWritten)
    assert (event.step, event.sha256, event.samples) == (6, untold.sha256, 24)


def test_one_of_other_losses_is_set_aside_and_not_deleted(store: CheckpointStore, write: Write) -> None:
    told, foreign = write(3), write(6)
    earlier = [
        replace(event, loss=1.0) if isinstance(event, StepCommitted) and event.step == 6 else event
        for event in journal(told)
    ]
    emitted: list[Event] = []
    assert newest_usable(earlier, {3: told.sha256}, store, emitted.append) == told
    [event] = emitted
    assert isinstance(event, CheckpointRejected)
    assert "its loss or its samples differ" in event.problem
    assert store.list() == [told]
    files = sorted(path.name for path in Path(foreign.uri).iterdir())
    assert files == ["manifest.rejected.json", "shard-00000-of-00001.safetensors"]


def test_a_removal_that_nobody_lived_to_tell_of_is_told(store: CheckpointStore, write: Write) -> None:
    removed, told = write(1), write(3)
    store.discard(1)
    emitted: list[Event] = []
    assert newest_usable(journal(removed, told), {1: removed.sha256, 3: told.sha256}, store, emitted.append) == told
    [event] = emitted
    assert isinstance(event, CheckpointRemoved)
    assert (event.step, event.uri) == (1, removed.uri)


def test_without_mlflow_the_journal_decides(store: CheckpointStore, write: Write) -> None:
    told = write(3)
    emitted: list[Event] = []
    assert newest_usable(journal(told), None, store, emitted.append) == told
    assert [type(event) for event in emitted] == [Warned]


def test_a_run_without_a_checkpoint_begins_afresh(store: CheckpointStore) -> None:
    assert newest_usable(journal(), {}, store, lambda event: None) is None


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_afresh(store: CheckpointStore, write: Write) -> None:
    told = write(3)
    next(Path(told.uri).glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints under .* Nothing was changed"):
        newest_usable(journal(told), {3: told.sha256}, store, lambda event: None)
    assert store.list() == [told]


# ------------------------------------------------------------------------------------------ what a dead driver left

CONFIG = TrainConfig.load(None, ["train.steps=100", "faults=[{at: 5, kind: kill}]"])
STARTED = RunStarted(0.0, "demo", 1, {}, {"host": "example", "pid": "77"})


def header(step: int, generation: int = 0) -> ShardHeader:
    """Of the only rank's snapshot."""
    samples = tuple(range(step * 4, step * 4 + 4))
    record = StepRecord(step, ((0, float(step), samples),), 9, 0.0, 1.0 + step, 1e-3, 1.0, 0.0, 0.0)
    return ShardHeader(generation, step, 0, 1, "", {"optimizer_step": step}, pack_records([record]))


def told(steps: int, *more: Event) -> list[Event]:
    """The journal of a first attempt that was killed after this step, and the beginning of the next."""
    collector = CommitCollector(0, EMPTY_CHAIN)
    collector.begin(0, 1, 0)
    committed = [event for step in range(1, steps + 1) for event in collector.add(header(step), 2.0 + step)]
    generation = GenerationStarted(1.0, 0, {"dp": 1}, 1, 1, "start", "fresh", "bit_exact", ())
    return [STARTED, generation, *committed, *more, replace(STARTED, at=100.0, attempt=2)]


def estate(*held: ShardHeader, trusted: dict[int, int] | None = None, at_step: int = 0) -> Estate:
    """What the only keeper tells; its worker was in step `at_step`."""
    index, ticket = ShardIndex((Fragment("param/w", 0, 2),)), ArenaTicket(1, 2, 8)
    shards = tuple(StoredShard(h, index, False, "a", ticket) for h in held)
    exited = WorkerExited("worker-0", 50.0, Cause("signal", "SIGKILL"), 0, at_step, "backward")
    events = ((7, FaultAnnounced(49.0, 0, 5, 0)), (8, exited))
    tensors = (LogicalTensor("param/w", (2,)),)
    bequest = Bequest("a", "ray-id", ("127.0.0.1", 1), shards, (), events, trusted or {}, tensors)
    return Estate({}, [bequest], 4)


def begin(earlier: list[Event], left: Estate | None, store: CheckpointStore) -> tuple[StartPoint, list[Event]]:
    emitted: list[Event] = []
    return start_point(CONFIG, earlier, left, dict, store, emitted.append), emitted


def test_memory_comes_first_and_what_it_knows_is_told(store: CheckpointStore) -> None:
    start, emitted = begin(told(6), estate(header(7), header(8), at_step=10), store)
    assert (start.restore.source, start.restore.step, len(start.restore.shards)) == ("memory", 8, 1)
    death, fault, *_ = emitted
    assert isinstance(death, FailureDetected)
    assert (death.kind, death.node, death.pid, death.step, death.at) == ("driver_lost", "example", 77, 7, 8.0)
    assert isinstance(fault, FaultInjected)
    assert [e.step for e in emitted if isinstance(e, StepCommitted)] == [7, 8]
    assert start.generation == 4, "above all that the keepers know of"
    assert start.fired == {0}
    assert start.lost_steps == 1, "the update of step 9 was done, that of step 10 was not"
    assert start.remembered is not None
    assert (start.remembered.loss, start.remembered.scalars, start.remembered.layouts) == (
        8.0,
        {"optimizer_step": 8},
        {0: {"dp": 1}},
    )
    assert [loss for loss, _ in start.seen] == [float(step) for step in range(1, 9)]

    again, emitted = begin([*told(6)[:-1], *emitted, replace(STARTED, attempt=3)], estate(header(7), header(8)), store)
    assert again.restore == start.restore
    assert again.sample_chain == start.sample_chain
    assert [type(event) for event in emitted] == [FailureDetected], "a second death on the way tells nothing twice"


def test_a_newer_checkpoint_comes_before_memory(store: CheckpointStore, write: Write) -> None:
    for step, source in ((5, "memory"), (6, "durable")):
        earlier = told(6)
        stored = write(step, next(e for e in earlier if isinstance(e, StepCommitted) and e.step == step))
        start, _ = begin(earlier, estate(header(5)), store)
        assert (start.restore.source, start.restore.step) == (source, stored.step)
        assert start.lost_steps == 6 - stored.step


def test_a_checkpoint_that_memory_makes_needless_is_told_and_not_read(store: CheckpointStore, write: Write) -> None:
    committed = told(8)[:-1]
    stored = write(8, next(e for e in committed if isinstance(e, StepCommitted) and e.step == 8))
    next(Path(stored.uri).glob("*.safetensors")).write_bytes(b"")
    for known in (8, 6):  # what the journal lacks is told first, and explains the checkpoint
        start, emitted = begin(told(known), estate(header(7), header(8)), store)
        assert (start.restore.source, start.restore.step) == ("memory", 8)
        assert [e.step for e in emitted if isinstance(e, CheckpointWritten)] == [8]
        assert not any(isinstance(e, CheckpointRejected) for e in emitted)


def test_memory_serves_where_no_checkpoint_can(store: CheckpointStore, write: Write) -> None:
    earlier = told(6)
    stored = write(6, next(e for e in earlier if isinstance(e, StepCommitted) and e.step == 6))
    next(Path(stored.uri).glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(CheckpointError):
        begin(earlier, None, store)
    start, emitted = begin(earlier, estate(header(5)), store)
    assert (start.restore.source, start.restore.step) == ("memory", 5)
    assert any(isinstance(e, Warned) and "goes on from memory" in e.message for e in emitted)


def test_what_workers_found_corrupted_is_not_used(store: CheckpointStore) -> None:
    start, _ = begin(told(6), estate(header(5), header(6), trusted={0: 5}), store)
    assert (start.restore.source, start.restore.step) == ("memory", 5)
    start, _ = begin(told(6), estate(header(5), header(6), trusted={0: 2}), store)
    assert start.restore.source == "fresh"


def test_the_last_step_is_done_again(store: CheckpointStore) -> None:
    """The state after it is written down and judged when it is committed."""
    start, _ = begin(told(99), estate(header(99), header(100)), store)
    assert start.restore.step == 99


def test_a_run_that_ended_has_no_dead_driver(store: CheckpointStore) -> None:
    start, emitted = begin(told(6, RunEnded(9.0, "stopped", 6)), None, store)
    assert (start.restore.source, start.lost_steps, emitted) == ("fresh", None, [])
