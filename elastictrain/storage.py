"""Where a run's files live: one folder or object store, behind pyarrow's filesystems.

Contract: a write is atomic (a reader, or a crash at any moment, sees the whole new file or what was there before) and,
in a local folder, durable when the call returns: temporary file in the same folder, fsync, rename, fsync of the folder.
An object store makes an object visible when its upload completes. Paths are relative to the base, with `/`; one that
leads out of it (absolute, or through `..`) is refused with PermissionError, whoever made it up. Access keys inside a
URI go to the filesystem only: neither `uri` nor any message holds them.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from elastictrain.errors import ConfigError

Data = bytes | bytearray | memoryview

_PROBE_BYTES = 1 << 20


@dataclass(frozen=True)
class Storage:
    """A folder of some filesystem. `local` is its path where that is this machine's own (or mounted) filesystem."""

    filesystem: Any = field(repr=False)
    base: str
    uri: str
    """For people and records: without access keys and options."""
    local: Path | None

    @classmethod
    def open(cls, uri: str) -> Storage:
        """The storage at a folder path or a URI (file://, s3://, gs://); touches nothing yet."""
        if "://" not in uri:
            return cls._folder(uri)
        try:
            filesystem, base = FileSystem.from_uri(uri)
        except (OSError, ValueError, NotImplementedError) as error:
            raise ConfigError(
                f"run.storage {_public(uri)} can't be opened: {_reason(error)}. Give a folder, or a URI such as "
                f"file:///data/runs, s3://bucket/runs or gs://bucket/runs."
            ) from None
        if isinstance(filesystem, LocalFileSystem):
            return cls._folder(base)
        return cls(filesystem, base.rstrip("/"), _public(uri).rstrip("/"), None)

    @classmethod
    def _folder(cls, path: str) -> Storage:
        folder = Path(os.path.abspath(Path(path).expanduser()))
        return cls(LocalFileSystem(), str(folder), str(folder), folder)

    def run(self, name: str) -> Storage:
        """The part of the storage that belongs to the run `name`."""
        local = self.local / name if self.local is not None else None
        return Storage(self.filesystem, f"{self.base}/{name}", f"{self.uri}/{name}", local)

    def check_writable(self) -> None:
        """Write and remove a file of 1 MiB; raises ConfigError with the reason when that fails."""
        probe = f".probe-{secrets.token_hex(4)}"
        try:
            self.write_atomic(probe, bytes(_PROBE_BYTES))
            self.delete(probe)
        except OSError as error:
            reason = _without(probe, _reason(error))
            raise ConfigError(
                f"run.storage {self.uri} can't be written: {reason}. Make it writable and free at least "
                f"1 MiB there, or set run.storage to another folder or URI."
            ) from None

    def write_atomic(self, path: str, data: Data) -> None:
        """Replace the file with `data`, whole or not at all. Raises OSError."""
        self.write_stream(path, (data,))

    def write_stream(self, path: str, parts: Iterable[Data]) -> None:
        """`write_atomic` of parts that come one by one: memory for one part, whatever the file's size.

        When this raises, no part of the file is left behind.
        """
        if self.local is not None:
            _write_local(Path(self._at(path)), parts)
            return
        target = self._at(path)
        try:
            with self.filesystem.open_output_stream(target) as stream:
                for part in parts:
                    stream.write(part)
        except BaseException:
            self.delete(path)
            raise

    def read(self, path: str) -> bytes:
        """The whole file; raises FileNotFoundError when it is not there."""
        with self.filesystem.open_input_stream(self._at(path)) as stream:
            data: bytes = stream.read()
        return data

    def open_input(self, path: str) -> Any:
        """A seekable pyarrow file to read ranges from."""
        return self.filesystem.open_input_file(self._at(path))

    def list(self, folder: str = "") -> list[str]:
        """Names of the files and folders directly in `folder`, sorted; empty when it is not there."""
        selector = FileSelector(self._at(folder), allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def num_bytes(self, path: str) -> int:
        """Size of a file; raises FileNotFoundError when there is no file there."""
        info = self.filesystem.get_file_info(self._at(path))
        if info.type != FileType.File:
            raise FileNotFoundError(f"no file {self.uri}/{path}")
        return int(info.size)

    def exists(self, path: str) -> bool:
        """Whether there is a file or folder."""
        return bool(self.filesystem.get_file_info(self._at(path)).type != FileType.NotFound)

    def is_link(self, path: str) -> bool:
        """Whether there is a symbolic link, to wherever; never in an object store."""
        return self.local is not None and os.path.islink(self._at(path))

    def delete(self, path: str) -> None:
        """Remove a file, or a folder and all in it; nothing there is fine. Gone for good when this returns.

        Of a link, the link goes, and not what it leads to.
        """
        if self.is_link(path):
            os.unlink(self._at(path))
            _sync_folder(Path(self._at(path)).parent)
            return
        kind = self.filesystem.get_file_info(self._at(path)).type
        if kind == FileType.Directory:
            self.filesystem.delete_dir(self._at(path))
        elif kind == FileType.File:
            self.filesystem.delete_file(self._at(path))
        else:
            return
        if self.local is not None:
            _sync_folder((self.local / path).parent)

    def _at(self, path: str) -> str:
        if path.startswith("/") or ".." in path.split("/"):
            raise PermissionError(errno.EPERM, f"a path that leads out of {self.uri} is not followed", path)
        return f"{self.base}/{path}".rstrip("/")


def _write_local(path: Path, parts: Iterable[Data]) -> None:
    _make_folder(path.parent)
    temporary = path.parent / f".part-{secrets.token_hex(4)}-{path.name}"
    try:
        with open(temporary, "xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _public(text: str) -> str:
    """A URI, or a message that quotes one, without its user part and options."""
    return re.sub(r"://[^/\s'\"]*@", "://", re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text))


def _without(name: str, text: str) -> str:
    """The text without the paths that hold this name: a file that the user never heard of."""
    return re.sub(rf"\s*\([^()]*{name}[^()]*\)|['\"]?[^\s'\"()]*{name}[^\s'\"()]*['\"]?", "", text)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    return _public(str(error)).rstrip(".")
