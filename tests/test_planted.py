"""Whoever can write to a run's storage can spoil the run, and no more: nothing planted there runs or leads outside."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from elastictrain.checkpoint.store import CheckpointStore, Incomplete
from elastictrain.cli import app
from elastictrain.data.manifest import Manifest as DataManifest
from elastictrain.data.manifest import ShardRecord
from elastictrain.data.shards import TokenShards
from elastictrain.errors import CheckpointError, DataError
from elastictrain.events import RunStarted, encode
from elastictrain.state.manifest import Manifest
from elastictrain.state.tensors import Fragment, LogicalTensor, ShardIndex
from elastictrain.storage import Storage
from elastictrain.tracking.deliver import is_delivered
from elastictrain.tracking.journal import Journal, read_journal

SHARD = "shard-00000-of-00001.safetensors"


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[bytes]:
    """A pickle that shows when it was opened; none may be by the end of the test."""
    marker = tmp_path / "unpickled"
    planted = pickle.dumps(Trap(marker))
    pickle.loads(planted)  # noqa: S301 - the trap works
    marker.rmdir()
    yield planted
    assert not marker.exists()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(str(tmp_path / "runs")).run("demo")


@pytest.fixture
def store(storage: Storage) -> CheckpointStore:
    """With a whole checkpoint of step 1, and one of step 2 to spoil."""
    store = CheckpointStore(storage)
    index = ShardIndex((Fragment("param/w", 0, 64),))
    for step in (1, 2):
        shard = store.write_shard(step, 0, 1, index, struct.pack("<64f", *range(64)))
        tensors = (LogicalTensor("param/w", (64,)),)
        store.commit(Manifest("demo", step, step * 16, "", 1.5, {}, {}, tensors, (shard,), 1e9))
    return store


def folder(storage: Storage, step: int) -> Path:
    assert storage.local is not None
    return storage.local / "checkpoints" / f"step-{step:08d}"


def edit(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data) + "\n")


def refused(store: CheckpointStore, message: str) -> None:
    """Step 2 is, by all ways to it; and step 1 is used."""
    with pytest.raises(CheckpointError, match=message):
        store.verify(2)
    rejected = []
    found = store.take_newest({}, lambda *what: rejected.append(what), lambda manifest: "")
    assert found is not None
    assert (found.step, [step for step, _, _ in rejected]) == (1, [2])


@pytest.mark.parametrize(
    "name",
    [
        f"../step-00000001/{SHARD}",
        f"./{SHARD}",
        f"{{outside}}/{SHARD}",
        f"file://{{outside}}/{SHARD}",
        f"{SHARD}\x00",
        "..",
        "",
        7,
        None,
        ["a"],
    ],
)
def test_a_manifest_that_leads_elsewhere_is_refused_even_where_a_whole_shard_lies(
    store: CheckpointStore, storage: Storage, tmp_path: Path, name: object
) -> None:
    shutil.copytree(folder(storage, 1), tmp_path / "outside")
    name = name.format(outside=tmp_path / "outside") if isinstance(name, str) else name
    edit(folder(storage, 2) / "manifest.json", lambda data: data["shards"][0].update(file=name))
    refused(store, r"step-00000002/manifest\.json can't be used: manifest (names|has file)")


def test_a_link_in_a_checkpoint_is_not_followed(store: CheckpointStore, storage: Storage, tmp_path: Path) -> None:
    outside = tmp_path / "outside" / SHARD
    shutil.copytree(folder(storage, 2), outside.parent)
    (folder(storage, 2) / SHARD).unlink()
    (folder(storage, 2) / SHARD).symlink_to(outside)
    refused(store, rf"step-00000002/{SHARD} is a symbolic link")
    store.discard(2)
    assert outside.exists()


def test_a_linked_checkpoint_is_neither_read_nor_emptied(
    store: CheckpointStore, storage: Storage, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    shutil.move(folder(storage, 2), outside)
    folder(storage, 2).symlink_to(outside)
    kept = sorted(path.name for path in outside.iterdir())
    refused(store, "step-00000002 is a symbolic link")
    assert isinstance(store.scan()[0], Incomplete)
    store.discard(2)
    assert sorted(path.name for path in outside.iterdir()) == kept
    assert not os.path.lexists(folder(storage, 2))
    assert store.steps() == {1}


def test_a_pickled_shard_is_not_opened_even_with_its_right_digest(
    store: CheckpointStore, storage: Storage, trap: bytes
) -> None:
    path = folder(storage, 2) / SHARD
    planted = trap.ljust(path.stat().st_size, b".")
    path.write_bytes(planted)
    with pytest.raises(CheckpointError, match=f"{SHARD} has SHA-256"):
        store.verify(2)
    digest = hashlib.sha256(planted).hexdigest()
    edit(folder(storage, 2) / "manifest.json", lambda data: data["shards"][0].update(sha256=digest))
    store.verify(2)  # unsigned and not on record: nothing tells that it was changed
    with pytest.raises(CheckpointError, match=rf"step-00000002/{SHARD} can't be read: its header"):
        store.open(2).fill([(Fragment("param/w", 0, 64), memoryview(np.zeros(64, np.float32)))])


def test_a_pickled_manifest_is_not_opened(store: CheckpointStore, storage: Storage, trap: bytes) -> None:
    (folder(storage, 2) / "manifest.json").write_bytes(trap)
    refused(store, r"step-00000002/manifest\.json can't be used: manifest is not JSON")


def test_storage_follows_no_path_out_of_itself(storage: Storage, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    for path in ("../../precious", str(precious), "a/../../../precious", ".."):
        for use in (storage.read, storage.list, storage.exists, storage.num_bytes, storage.open_input, storage.delete):
            with pytest.raises(PermissionError, match="leads out of"):
                use(path)
        with pytest.raises(PermissionError, match="leads out of"):
            storage.write_atomic(path, b"")
    assert precious.read_text() == "kept"
    storage.write_atomic("a/..b..c", b"x")
    assert storage.read("a/..b..c") == b"x"


# prepared data

RECORD = ShardRecord("train-00000.arrow", "ab" * 32, 500, "cd" * 32, 2, 9, 0, 40, 0)


def data_manifest(home: Path) -> DataManifest:
    held_out = replace(RECORD, name="validation-00000.arrow")
    return DataManifest(home, "f", 4, 300, "cd" * 32, 1, 0, 40, (RECORD,), (held_out,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["train"][0].update(name="../../secret/train-00000.arrow"), "is not the name of a token"),
        (lambda data: data["train"][0].update(name="/etc/train-00000.arrow"), "is not the name of a token shard"),
        (lambda data: data["train"][0].update(name="train-00000.pkl"), "is not the name of a token shard"),
        (lambda data: data["train"][0].update(name=None), "name is None, no text"),
        (lambda data: data["train"][0].update(name="validation-00000.arrow"), "is listed as a shard of train"),
        (lambda data: data["train"][0].update(sha256="x"), "has no SHA-256"),
        (lambda data: data["train"][0].update(num_samples=-1), "num_samples is -1, no count"),
        (lambda data: data["train"][0].update(num_samples="2"), "num_samples is '2', no count"),
        (lambda data: data["train"][0].update(num_bytes=True), "num_bytes is True, no count"),
        (lambda data: data.update(train=[["name"]]), "TypeError"),
        (lambda data: data.update(seq_len=0), "must be positive"),
        (lambda data: data.update(vocab_size=2.5), r"vocab_size is 2\.5, no count"),
        (lambda data: data.update(folder="/etc"), "TypeError"),
    ],
)
def test_a_data_manifest_that_leads_elsewhere_or_is_odd_is_refused(
    tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(data_manifest(tmp_path).to_json())
    assert DataManifest.load(tmp_path) == data_manifest(tmp_path)
    edit(path, change)
    with pytest.raises(DataError, match=rf"manifest\.json is damaged: .*{message}"):
        DataManifest.load(tmp_path)


def test_no_record_of_a_shard_is_better_than_a_planted_one(tmp_path: Path, trap: bytes) -> None:
    path = tmp_path / "train-00000.json"
    RECORD.save(tmp_path)
    assert ShardRecord.load(tmp_path, RECORD.name) == RECORD
    for content in (trap, b"[" * 100_000, path.read_bytes().replace(b"500", b'"many"')):
        path.write_bytes(content)
        assert ShardRecord.load(tmp_path, RECORD.name) is None


def arrow(rows: int, row_tokens: int = 5, token: pa.DataType | None = None, name: str = "tokens") -> bytes:
    kind = pa.list_(token or pa.uint16(), row_tokens)
    sink = pa.BufferOutputStream()
    values = pa.array(range(rows * row_tokens), kind.value_type)
    column = pa.FixedSizeListArray.from_arrays(values, type=kind)
    schema = pa.schema([pa.field(name, kind)])
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([column], schema=schema))
    content: bytes = sink.getvalue().to_pybytes()
    return content


def test_a_token_shard_that_holds_something_else_is_refused(tmp_path: Path, trap: bytes) -> None:
    def shards(content: bytes) -> TokenShards:
        (tmp_path / RECORD.name).write_bytes(content)
        record = replace(RECORD, num_bytes=len(content))
        return TokenShards(replace(data_manifest(tmp_path), train=(record,)))

    assert shards(arrow(rows=2)).read([1]).tolist() == [[5, 6, 7, 8, 9]]
    cut = arrow(rows=2)
    for content in (
        trap,
        arrow(rows=1),
        arrow(rows=3),
        arrow(rows=2, row_tokens=4),
        arrow(rows=2, token=pa.float64()),
        arrow(rows=2, name="other"),
        cut[: len(cut) // 2] + cut[len(cut) // 2 + 8 :],
    ):
        with pytest.raises(DataError, match=r"token shard .*train-00000\.arrow"):
            shards(content).read([1])


# the run's own record

STARTED = RunStarted(1.0, "demo", 1, {}, {"python": "3.11"})


@pytest.mark.parametrize(
    "line",
    [
        b"[1, 2]",
        b'"RunStarted"',
        b"null",
        b'{"event": ["RunStarted"]}',
        b'{"event": "RunStarted"}',
        json.dumps({**encode(STARTED), "at": "soon"}).encode(),
        json.dumps({**encode(STARTED), "attempt": [1]}).encode(),
        json.dumps({**encode(STARTED), "environment": {"python": {"a": 1}}}).encode(),
        json.dumps({"event": "RunEnded", "at": 1.0, "status": "complete", "step": 1, "cause": 5}).encode(),
        b"[" * 100_000,
        b"\xff\xfe\x00",
    ],
)
def test_an_odd_line_in_the_journal_is_told_with_its_place(tmp_path: Path, line: bytes) -> None:
    journal = Journal(tmp_path, 1)
    journal.append(STARTED)
    at = journal.path.stat().st_size
    with journal.path.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(DataError, match=rf"attempt-0001\.jsonl is damaged at byte {at}: "):
        read_journal(tmp_path)


def test_a_pickled_journal_or_status_is_told_by_the_commands(tmp_path: Path, trap: bytes) -> None:
    home = tmp_path / "runs" / "demo"
    home.mkdir(parents=True)
    Journal(home, 1).append(STARTED)
    for content in (trap, b"[]", b"{}", b"[" * 100_000, b'{"run": 5, "status": [], "workers": {"rank": null}}'):
        (home / "status.json").write_bytes(content)
        told = CliRunner().invoke(app, ["status", "demo", "--storage", str(tmp_path / "runs")])
        assert (told.exit_code, "status.json is damaged" in told.output) == (2, True), told.output
    (home / "status.json").unlink()
    (home / "journal" / "attempt-0001.jsonl").write_bytes(trap + b"\n")
    told = CliRunner().invoke(app, ["report", "demo", "--storage", str(tmp_path / "runs")])
    assert (told.exit_code, "attempt-0001.jsonl is damaged" in told.output) == (2, True), told.output


@pytest.mark.parametrize(
    "saved", ["[]", "[" * 100_000, '{"run_id": "a", "attempt": Infinity, "offset": 0}', '{"run_id": "a", "attempt": 1}']
)
def test_an_odd_note_of_what_was_delivered_means_nothing_was(tmp_path: Path, saved: str) -> None:
    Journal(tmp_path, 1).append(STARTED)
    (tmp_path / "mlflow.json").write_text(saved)
    assert not is_delivered(tmp_path)
    (tmp_path / "mlflow.json").write_text('{"run_id": "a", "attempt": 1, "offset": -5}')
    assert not is_delivered(tmp_path)
