"""Durable checkpoints: whole, checked, and never half there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem
from safetensors import safe_open

from elastictrain.checkpoint.signature import Signer
from elastictrain.checkpoint.store import CheckpointStore, Incomplete, StoredCheckpoint
from elastictrain.errors import CheckpointError
from elastictrain.state.manifest import Manifest
from elastictrain.state.tensors import Fragment, ShardIndex
from elastictrain.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(str(tmp_path)).run("demo")


@pytest.fixture
def store(storage: Storage) -> CheckpointStore:
    return CheckpointStore(storage)


def write(store: CheckpointStore, state, step: int, world_size: int = 2) -> StoredCheckpoint:
    indexes = [state.index(rank, world_size) for rank in range(world_size)]
    shards = [store.write_shard(step, r, world_size, i, state.shard(i)) for r, i in enumerate(indexes)]
    return store.commit(manifest(state, step, tuple(shards)))


def manifest(state, step: int, shards: tuple) -> Manifest:
    layout = {"dp": len(shards), "zero_stage": 1}
    scalars = {"optimizer_step": step}
    return Manifest("demo", step, step * 16, "ab" * 32, 1.5, layout, scalars, state.tensors, shards, 1e9)


def never(found: Manifest) -> str:
    raise AssertionError(f"step {found.step} is in the record: nobody is to be asked about it")


def never_rejected(step: int, uri: str, problem: str) -> None:
    raise AssertionError(f"step {step} was rejected: {problem}")


def folder(storage: Storage, step: int) -> Path:
    assert storage.local is not None
    return storage.local / "checkpoints" / f"step-{step:08d}"


def test_round_trip_at_another_layout(store: CheckpointStore, storage: Storage, state) -> None:
    stored = write(store, state, 123, world_size=3)
    assert sorted(p.name for p in folder(storage, 123).iterdir()) == [
        "manifest.json",
        "shard-00000-of-00003.safetensors",
        "shard-00001-of-00003.safetensors",
        "shard-00002-of-00003.safetensors",
    ]
    assert stored.num_bytes == sum(p.stat().st_size for p in folder(storage, 123).iterdir())
    assert stored.uri == str(folder(storage, 123)) == store.uri(123)
    assert stored.sha256 == hashlib.sha256((folder(storage, 123) / "manifest.json").read_bytes()).hexdigest()
    assert store.list() == [stored] == [store.verify(123)] == [store.verify(123, stored.sha256)]
    source = store.open(123)
    assert source.scalars == {"optimizer_step": 123}
    assert state.equals(state.read_from(source))


def test_any_safetensors_reader_can_open_a_shard(store: CheckpointStore, storage: Storage, state) -> None:
    write(store, state, 1)
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for file in folder(storage, 1).glob("*.safetensors"):
        with safe_open(file, "np") as shard:
            for name in shard.keys():  # noqa: SIM118 - no mapping
                tensor, _, start = name.rpartition("@")
                found.setdefault(tensor, []).append((int(start), shard.get_tensor(name)))
    for name, array in state.arrays.items():
        whole = np.concatenate([part for _, part in sorted(found[name], key=lambda pair: pair[0])])
        assert whole.dtype == np.float32
        assert whole.tobytes() == array.tobytes()


def test_an_object_store_serves_as_well(state) -> None:
    base = f"bucket-{uuid.uuid4().hex}/runs/demo"
    store = CheckpointStore(Storage(PyFileSystem(FSSpecHandler(MemoryFileSystem())), base, f"memory://{base}", None))
    for step in (1, 2, 3):
        stored = write(store, state, step)
    assert store.verify(3, stored.sha256).uri == f"memory://{base}/checkpoints/step-00000003"
    assert state.equals(state.read_from(store.open(3)))
    assert store.prune(2) == (1,)
    assert [found.step for found in store.list()] == [3, 2]


def test_reading_touches_only_what_is_asked(store: CheckpointStore, storage: Storage, state) -> None:
    write(store, state, 1)
    (folder(storage, 1) / "shard-00001-of-00002.safetensors").unlink()
    part = np.zeros(3, np.float32)
    store.open(1).fill([(Fragment("exp_avg/a", 2, 3), memoryview(part))])
    assert np.array_equal(part, state.arrays["exp_avg/a"].reshape(-1)[2:5])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


class Trap:
    """Unpickling it would be noticed."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return pytest.fail, ("unpickled",)


def plant_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Trap()).ljust(path.stat().st_size, b"."))


def edit_manifest(**changes: object) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def plant_traversal(path: Path) -> None:
    path.write_text(path.read_text().replace("shard-00000-of-00002.safetensors", "../../../../etc/passwd"))


SHARD, MANIFEST = "shard-00001-of-00002.safetensors", "manifest.json"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (SHARD, flip, f"step-00000002/{SHARD} has SHA-256 .*, its manifest says"),
        (SHARD, truncate, f"{SHARD} has .* bytes, its manifest says .*: truncated"),
        (SHARD, Path.unlink, f"{SHARD} is not there"),
        (SHARD, plant_pickle, f"{SHARD} has SHA-256"),
        (MANIFEST, flip, "manifest is not JSON"),
        (MANIFEST, truncate, "manifest is not JSON"),
        (MANIFEST, Path.unlink, "step-00000002 has no manifest.json: it was never completed"),
        (MANIFEST, plant_pickle, "manifest is not JSON"),
        (MANIFEST, plant_traversal, "names '../../../../etc/passwd'"),
        (MANIFEST, edit_manifest(format_version=9), "format_version 9, this program reads 1"),
        (MANIFEST, edit_manifest(samples=7), "has SHA-256 .*, the run's record says"),
        (MANIFEST, edit_manifest(step=3), "is that of step 3"),
    ],
)
def test_damage_is_reported_and_the_one_before_used(
    store: CheckpointStore, storage: Storage, state, file: str, damage: Callable[[Path], None], message: str
) -> None:
    record = {stored.step: stored.sha256 for stored in (write(store, state, 1), write(store, state, 2))}
    damage(folder(storage, 2) / file)
    rejected: list[tuple[int, str, str]] = []
    with pytest.raises(CheckpointError, match=message):
        store.verify(2, record[2])
    found = store.newest_verified(record, lambda *what: rejected.append(what), never)
    assert found is not None
    assert found.step == 1
    assert [(step, uri) for step, uri, _ in rejected] == [(2, store.uri(2))]
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(rejected[0][2])


def test_a_shard_that_lies_about_its_header_is_not_read(store: CheckpointStore, storage: Storage, state) -> None:
    write(store, state, 1)
    path = folder(storage, 1) / SHARD
    for old, new in ((b'"F32"', b'"F64"'), (b"@17", b"@16"), (b'{"', b'["')):
        original = path.read_bytes()
        path.write_bytes(original.replace(old, new))
        with pytest.raises(CheckpointError, match=f"{SHARD} can't be read: its header"):
            state.read_from(store.open(1))
        path.write_bytes(original)
    path.write_bytes(b"\xff" * 8 + original[8:])
    with pytest.raises(CheckpointError, match="its header is not of"):
        state.read_from(store.open(1))
    path.write_bytes(original[:-4])
    with pytest.raises(CheckpointError, match="ends 4 bytes too early"):
        state.read_from(store.open(1))


def test_the_record_decides_what_is_used(store: CheckpointStore, state) -> None:
    first, second = write(store, state, 1), write(store, state, 2)
    rejected: list[tuple[int, str]] = []

    def on_reject(step: int, uri: str, problem: str) -> None:
        rejected.append((step, problem.replace(uri, "URI")))

    def foreign(found: Manifest) -> str:
        return f"its loss is {found.loss}"

    assert store.newest_verified({1: first.sha256}, on_reject, lambda found: "") == second
    assert rejected == []
    assert store.newest_verified({1: first.sha256, 5: "00"}, on_reject, foreign) == first
    assert rejected == [
        (5, "URI has no manifest.json: it was never completed"),
        (2, f"URI is not in the run's record, and its loss is {second.manifest.loss}"),
    ]
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints under .*Nothing was changed"):
        store.newest_verified({}, on_reject, foreign)
    assert store.list() == [second, first]


def test_one_that_can_not_be_read_now_is_tried_again(
    store: CheckpointStore, storage: Storage, state, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {stored.step: stored.sha256 for stored in (write(store, state, 1), write(store, state, 2))}
    failures = iter([OSError(errno.EIO, "Input/output error")] * 2)
    read = Storage.read

    def unreliable(self: Storage, path: str) -> bytes:
        for failure in failures:
            raise failure
        return read(self, path)

    monkeypatch.setattr(Storage, "read", unreliable)
    found = store.newest_verified(record, never_rejected, never)
    assert found is not None
    assert found.step == 2

    def gone(self: Storage, path: str) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Storage, "read", gone)
    rejected = []
    with pytest.raises(CheckpointError, match=r"Input/output error.*Nothing was changed"):
        store.newest_verified(record, lambda *what: rejected.append(what), never)
    assert [step for step, _, _ in rejected] == [2, 1]


def test_one_set_aside_is_no_checkpoint_and_can_be_had_back(store: CheckpointStore, storage: Storage, state) -> None:
    first, second = write(store, state, 1), write(store, state, 2)
    store.set_aside(2)
    assert store.list() == [first]
    assert store.prune(1) == ()
    assert folder(storage, 2).joinpath(SHARD).exists()
    os.rename(folder(storage, 2) / "manifest.rejected.json", folder(storage, 2) / MANIFEST)
    assert store.list() == [second, first]
    store.set_aside(2)
    assert write(store, state, 2, world_size=3).step == 2
    assert store.verify(2).manifest.shards
    store.set_aside(7)  # nothing there: nothing to do


def test_scan_tells_of_the_unfinished(store: CheckpointStore, storage: Storage, state) -> None:
    assert store.scan() == []
    complete = write(store, state, 1)
    index = state.index(0, 2)
    store.write_shard(2, 0, 2, index, state.shard(index))
    (folder(storage, 1).parent / "notes").mkdir()
    unfinished = Incomplete(2, f"{store.uri(2)} has no manifest.json: it was never completed", completed=False)
    assert store.scan() == [unfinished, complete]
    assert store.list() == [complete]
    with pytest.raises(CheckpointError, match="no manifest"):
        store.open(2)


def test_a_manifest_is_refused_while_a_shard_is_missing(store: CheckpointStore, state) -> None:
    indexes = [state.index(rank, 2) for rank in range(2)]
    first = store.write_shard(1, 0, 2, indexes[0], state.shard(indexes[0]))
    second = store.write_shard(2, 1, 2, indexes[1], state.shard(indexes[1]))
    with pytest.raises(CheckpointError, match=f"{SHARD} is not there.*set run.storage to one that they have"):
        store.commit(manifest(state, 1, (first, second)))
    assert store.list() == []


def test_prune_keeps_the_newest_and_what_is_being_written(store: CheckpointStore, storage: Storage, state) -> None:
    index = state.index(0, 2)
    store.write_shard(1, 0, 2, index, state.shard(index))
    assert store.prune(1) == ()  # No complete one yet: nothing is known to be left over.
    for step in (2, 3, 4):
        write(store, state, step)
    store.write_shard(5, 0, 2, index, state.shard(index))
    assert store.prune(2) == (1, 2)
    assert [found.step for found in store.scan()] == [5, 4, 3]
    assert store.prune(2) == ()
    store.discard(4)
    assert [found.step for found in store.list()] == [3]
    assert not folder(storage, 4).exists()


def test_a_pinned_one_is_kept_until_it_is_let_go(store: CheckpointStore, state) -> None:
    for step in (1, 2, 3):
        write(store, state, step)
    assert store.pin(1)
    assert not store.pin(7)
    assert store.prune(1) == (2,)
    assert store.verify(1).step == 1
    store.unpin(1)
    assert store.prune(1) == (1,)
    assert store.steps() == {3}


def test_a_copy_of_another_run_is_the_run_s_own(tmp_path: Path, store: CheckpointStore, state) -> None:
    found = write(store, state, 5, world_size=3)
    key = bytes(range(32))
    other = CheckpointStore(Storage.open(str(tmp_path)).run("other"), Signer("other", (key,)))
    copy = other.adopt(store, 5, "other")
    assert (copy.manifest.run, copy.signature) == ("other", "valid")
    assert copy.manifest.shards == found.manifest.shards
    assert state.equals(state.read_from(other.open(5)))
    store.discard(5)
    assert other.verify(5, copy.sha256).step == 5
    write(store, state, 6)
    shard = next(folder(Storage.open(str(tmp_path)).run("demo"), 6).glob("*.safetensors"))
    flip(shard)
    with pytest.raises(CheckpointError, match="changed or damaged"):
        other.adopt(store, 6, "other")
    assert other.steps() == {5}


def test_the_same_step_may_be_written_again(store: CheckpointStore, state) -> None:
    write(store, state, 1, world_size=2)
    write(store, state, 1, world_size=3)
    assert len(store.verify(1).manifest.shards) == 3
    assert state.equals(state.read_from(store.open(1)))


def test_a_write_that_failed_leaves_nothing_and_harms_nothing(store: CheckpointStore, storage: Storage, state) -> None:
    stored = write(store, state, 1)
    store.write_shard(2, 0, 2, state.index(0, 2), state.shard(state.index(0, 2)))
    for step in (1, 2, 3):
        store.abandon(step)
    assert store.scan() == [stored]
    assert not folder(storage, 2).exists()
    rejected = []
    write(store, state, 3)
    store.write_shard(4, 0, 2, state.index(0, 2), state.shard(state.index(0, 2)))
    found = store.newest_verified({1: stored.sha256}, lambda *what: rejected.append(what), lambda found: "it is odd")
    assert found == stored
    assert [step for step, _, _ in rejected] == [4, 3]
    assert "never completed" in rejected[0][2]
    assert "not in the run's record" in rejected[1][2]


def test_a_shard_and_its_index_must_fit(store: CheckpointStore) -> None:
    with pytest.raises(CheckpointError, match="8 bytes was given 4"):
        store.write_shard(1, 0, 1, ShardIndex((Fragment("param/w", 0, 2),)), bytes(4))
    twice = ShardIndex((Fragment("param/w", 0, 1), Fragment("param/w", 0, 1)))
    with pytest.raises(CheckpointError, match="two fragments param/w@0"):
        store.write_shard(1, 0, 1, twice, bytes(8))
    assert store.scan() == []


def test_a_full_disk_leaves_no_partial_file(tiny_disk: Path) -> None:
    store = CheckpointStore(Storage.open(str(tiny_disk)))
    index = ShardIndex((Fragment("param/w", 0, 200_000),))
    with pytest.raises(CheckpointError, match=r"shard-00000-of-00001\.safetensors can't be written: No space left"):
        store.write_shard(1, 0, 1, index, bytes(800_000))
    assert [path for path in tiny_disk.rglob("*") if path.is_file()] == []


LIMITED = """
import resource, sys
from elastictrain.checkpoint.signature import Signer
from elastictrain.checkpoint.store import CheckpointStore
from elastictrain.errors import CheckpointError
from elastictrain.state.tensors import Fragment, ShardIndex
from elastictrain.storage import Storage
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
store = CheckpointStore(Storage.open(sys.argv[1]))
try:
    store.write_shard(1, 0, 1, ShardIndex((Fragment("param/w", 0, 200_000),)), bytes(800_000))
except CheckpointError as error:
    print(error)
"""


def test_a_file_that_may_not_grow_leaves_no_partial_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], check=True, capture_output=True, text=True)
    assert "can't be written: File too large" in done.stdout
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
