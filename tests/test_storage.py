"""Folders and object stores behind one face: atomic, and clear about what is wrong."""

from __future__ import annotations

import os
import pickle
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem

from elastictrain.errors import ConfigError
from elastictrain.storage import Storage


@pytest.fixture(params=["folder", "object store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return Storage.open(str(tmp_path / "runs"))
    base = f"bucket-{uuid.uuid4().hex}/runs"
    return Storage(PyFileSystem(FSSpecHandler(MemoryFileSystem())), base, f"memory://{base}", None)


def test_write_read_list_delete(storage: Storage) -> None:
    assert storage.list() == []
    storage.write_atomic("a/b.json", b"one")
    storage.write_atomic("a/b.json", b"second")
    storage.write_stream("a/c.bin", (bytes([n]) * 1000 for n in range(5)))
    assert storage.read("a/b.json") == b"second"
    assert storage.num_bytes("a/c.bin") == 5000
    assert (storage.list(), storage.list("a"), storage.list("nowhere")) == (["a"], ["b.json", "c.bin"], [])
    with storage.open_input("a/c.bin") as file:
        file.seek(1999)
        assert file.read(2) == b"\1\2"
    storage.delete("a/b.json")
    storage.delete("a/b.json")
    assert not storage.exists("a/b.json")
    assert storage.exists("a/c.bin")
    storage.delete("a")
    assert not storage.exists("a/c.bin")
    for missing in (storage.read, storage.num_bytes):
        with pytest.raises(FileNotFoundError):
            missing("a/c.bin")


def test_a_run_is_a_part_of_it(storage: Storage) -> None:
    run = storage.run("demo")
    run.write_atomic("journal", b"x")
    assert storage.read("demo/journal") == b"x"
    assert run.uri == f"{storage.uri}/demo"
    assert (run.local is None) == (storage.local is None)


def test_a_stream_that_breaks_leaves_what_was_there(storage: Storage) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        storage.write_stream("a/new", broken())
    assert storage.list("a") == []
    if storage.local is not None:
        storage.write_atomic("a/old", b"old")
        with pytest.raises(ZeroDivisionError):
            storage.write_stream("a/old", broken())
        assert storage.read("a/old") == b"old"
        assert storage.list("a") == ["old"]


def test_check_writable_makes_the_folder_and_leaves_nothing_in_it(storage: Storage) -> None:
    storage.check_writable()
    assert storage.list() == []


def test_paths_and_file_uris_are_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    places = [Storage.open(uri) for uri in ("runs/", "./x/../runs", "~/runs", f"file://{tmp_path}/runs")]
    assert {place.local for place in places} == {tmp_path / "runs"}
    assert {place.uri for place in places} == {str(tmp_path / "runs")}
    assert pickle.loads(pickle.dumps(places[0])).local == tmp_path / "runs"  # noqa: S301 - our own bytes


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        Storage.open(str(tmp_path)).write_atomic("file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_place_that_can_not_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        ConfigError, match=r"run\.storage .*/file/runs can't be written: Not a directory \(.*/file\)\. Make it"
    ):
        Storage.open(str(tmp_path / "file" / "runs")).check_writable()
    with pytest.raises(
        ConfigError, match=r"run\.storage /proc/runs can't be written: .*or set run\.storage to another"
    ):
        Storage.open("/proc/runs").check_writable()
    with pytest.raises(ConfigError, match=r"/sys can't be written: [^(]*\. Make it"):  # no word of the file tried
        Storage.open("/sys").check_writable()


def test_a_full_disk_is_said(tiny_disk: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't be written: No space left on device\. Make it"):
        Storage.open(str(tiny_disk)).check_writable()
    assert list(tiny_disk.iterdir()) == []


@pytest.mark.parametrize(
    "uri", ["what://KEY:SECRET@place/runs", "s3://KEY:SECRET@/?secret_key=SECRET", "file://h ost/"]
)
def test_uris_that_can_not_be_opened(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.storage .*can't be opened") as raised:
        Storage.open(uri)
    assert "SECRET" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_access_keys_are_not_shown() -> None:
    storage = Storage.open("s3://KEY:SECRET@bucket/runs/?region=eu-west-1&endpoint_override=localhost:1")
    assert storage.run("demo").uri == "s3://bucket/runs/demo"
    assert storage.run("demo").base == "bucket/runs/demo"
    assert "SECRET" not in repr(storage)
