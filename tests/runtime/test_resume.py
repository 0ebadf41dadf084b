"""From which checkpoint a run goes on: the record's word, the journal's, and that of the steps themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from elastictrain.checkpoint.store import CheckpointStore, StoredCheckpoint
from elastictrain.errors import CheckpointError
from elastictrain.events import (
    CheckpointRejected,
    CheckpointRemoved,
    CheckpointWritten,
    Event,
    GenerationStarted,
    StepCommitted,
    Warned,
)
from elastictrain.runtime.durable import as_written
from elastictrain.runtime.resume import newest_usable
from elastictrain.state.manifest import Manifest
from elastictrain.state.tensors import Fragment, LogicalTensor, ShardIndex
from elastictrain.storage import Storage

Write = Callable[[int], StoredCheckpoint]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(Storage.open(str(tmp_path)).run("demo"))


@pytest.fixture
def write(store: CheckpointStore) -> Write:
    """Writes the checkpoint of a step whose loss is its number."""

    def write(step: int) -> StoredCheckpoint:
        index = ShardIndex((Fragment("param/w", 0, 2),))
        shard = store.write_shard(step, 0, 1, index, bytes(8))
        tensors = (LogicalTensor("param/w", (2,)),)
        loss, chain = float(step), f"{step:064x}"
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
