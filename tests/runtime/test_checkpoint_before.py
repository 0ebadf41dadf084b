"""Where a roll-back goes: the newest whole checkpoint before the step, and not the one that happened to be ready."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Timer

import pytest

from elastictrain.checkpoint.store import CheckpointStore
from elastictrain.errors import CheckpointError
from elastictrain.runtime.bad_steps import checkpoint_before
from elastictrain.state.manifest import Manifest
from elastictrain.state.tensors import Fragment, LogicalTensor, ShardIndex
from elastictrain.storage import Storage

Write = Callable[[int], None]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(Storage.open(str(tmp_path)).run("demo"))


@pytest.fixture
def write(store: CheckpointStore) -> Write:
    def write(step: int) -> None:
        index, tensors = ShardIndex((Fragment("param/w", 0, 2),)), (LogicalTensor("param/w", (2,)),)
        shard = store.write_shard(step, 0, 1, index, bytes(8))
        store.commit(Manifest("demo", step, 4 * step, "ab" * 32, 1.0, {"dp": 1}, {}, tensors, (shard,), 1e9))

    return write


def damage(store: CheckpointStore, step: int) -> None:
    shard = next(Path(store.uri(step)).glob("*.safetensors"))
    shard.write_bytes(bytes(shard.stat().st_size))


def test_the_newest_before_the_step(store: CheckpointStore, write: Write) -> None:
    assert checkpoint_before(store, 10, every=10) is None
    for step in (10, 20, 30):
        write(step)
    assert checkpoint_before(store, 30, every=10) == 20
    assert checkpoint_before(store, 31, every=10) == 30
    write(33)  # of a stop
    assert checkpoint_before(store, 35, every=10) == 33


def test_one_that_is_due_is_waited_for(store: CheckpointStore, write: Write) -> None:
    write(10)
    timer = Timer(0.3, write, [20])
    timer.start()
    assert checkpoint_before(store, 23, every=10) == 20
    assert checkpoint_before(store, 33, every=10, patience_s=0.2) == 20
    timer.join()


def test_a_damaged_one_is_passed_over(store: CheckpointStore, write: Write) -> None:
    for step in (10, 20):
        write(step)
    damage(store, 20)
    assert checkpoint_before(store, 23, every=10) == 10
    damage(store, 10)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        checkpoint_before(store, 23, every=10)
