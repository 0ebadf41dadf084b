"""Durable checkpoints of one run: `checkpoints/step-00000123/` with shard files and, written last, `manifest.json`.

A checkpoint exists when its manifest does; a process killed at any moment leaves the older ones as they were, and at
worst files that no manifest names, which `prune` clears away. The manifest holds the SHA-256 of every shard, and its
own is kept by the run's record, so a changed byte anywhere is found before anything is loaded. No pickle, ever. With
a `Signer`, manifests are signed, and one that is not, or not with its keys, is as good as damaged.

Cost: `write_shard` reads the data once, hashing as it writes (SHA-256 bounds it, about 1 GB/s), and syncs it to disk.
All keepers must reach the same storage: the manifest is refused while a shard that it names is not there.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from elastictrain.checkpoint.shard_file import ShardStream, data_offset
from elastictrain.checkpoint.signature import Signer, split
from elastictrain.checkpoint.source import Reads, ShardedSource
from elastictrain.errors import CheckpointError, CheckpointUnreadableError
from elastictrain.state.manifest import Manifest, ShardEntry
from elastictrain.state.source import StateSource
from elastictrain.state.tensors import BYTES_PER_ELEMENT, ShardIndex
from elastictrain.storage import Storage

_ROOT = "checkpoints"
_MANIFEST = "manifest.json"
_SET_ASIDE = "manifest.rejected.json"
_PIN = "pinned"
_FOLDER = re.compile(r"step-(\d{8,})")
_CHUNK_BYTES = 4 << 20
_PAUSES_S = (0.2, 1.0)
"""Before each further try to read from storage that fails."""

Signature = Literal["none", "unchecked", "valid"]
"""Of a manifest: it has none; it has one, and there is no key here; it has the right one."""


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A checkpoint with a valid manifest; its shards are not verified yet."""

    step: int
    uri: str
    num_bytes: int
    """Of all its files."""
    sha256: str
    """Of the manifest without its signature: signing one later changes nothing that the run's record says."""
    signature: Signature
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Incomplete:
    """A checkpoint's folder without a valid manifest: never finished, half deleted, or damaged."""

    step: int
    problem: str
    completed: bool
    """Whether it has a manifest: without one it was never a checkpoint, or is none any more."""


class CheckpointStore:
    """The checkpoints in one run's storage."""

    def __init__(self, storage: Storage, signer: Signer | None = None) -> None:
        self._storage, self._signer = storage, signer

    def uri(self, step: int) -> str:
        """Where the checkpoint of this step is or would be."""
        return f"{self._storage.uri}/{_folder(step)}"

    def write_shard(
        self, step: int, rank: int, world_size: int, index: ShardIndex, data: bytes | bytearray | memoryview
    ) -> ShardEntry:
        """Write one shard, whole or not at all; raises CheckpointError with the reason when it can't be."""
        file = f"shard-{rank:05d}-of-{world_size:05d}.safetensors"
        stream = ShardStream(index, data)
        try:
            self._storage.write_stream(f"{_folder(step)}/{file}", stream)
        except OSError as error:
            raise self._unwritten(step, file, error) from error
        return ShardEntry(file, stream.num_bytes, stream.sha256, index)

    def commit(self, manifest: Manifest) -> StoredCheckpoint:
        """Complete the checkpoint: all shards are there, now write the manifest."""
        for shard in manifest.shards:
            self._check_size(manifest.step, shard)
        return self._write_manifest(manifest, manifest.to_json().encode())

    def sign(self, step: int, expected_sha256: str) -> StoredCheckpoint:
        """Sign a checkpoint that verifies in all but its signature; needs a signer. Raises CheckpointError."""
        stored = CheckpointStore(self._storage).verify(step, expected_sha256)
        data, _ = split(self._storage.read(f"{_folder(step)}/{_MANIFEST}"))
        if hashlib.sha256(data).hexdigest() != stored.sha256:
            raise CheckpointError(f"{stored.uri}/{_MANIFEST} was changed while its shards were being read")
        return self._write_manifest(stored.manifest, data)

    def _write_manifest(self, manifest: Manifest, data: bytes) -> StoredCheckpoint:
        content = self._signer.sign(data) if self._signer is not None else data
        try:
            self._storage.write_atomic(f"{_folder(manifest.step)}/{_MANIFEST}", content)
        except OSError as error:
            raise self._unwritten(manifest.step, _MANIFEST, error) from error
        return self._stored(manifest, content)

    def scan(self) -> list[StoredCheckpoint | Incomplete]:
        """Everything under checkpoints/, newest first."""
        found: list[StoredCheckpoint | Incomplete] = []
        for step in sorted(self.steps(), reverse=True):
            try:
                found.append(self._read(step))
            except CheckpointError as error:
                found.append(Incomplete(step, str(error), self._is_there(step, _MANIFEST)))
        return found

    def list(self) -> list[StoredCheckpoint]:
        """The complete checkpoints, newest first."""
        return [found for found in self.scan() if isinstance(found, StoredCheckpoint)]

    def verify(self, step: int, expected_sha256: str | None = None) -> StoredCheckpoint:
        """Read every byte of the checkpoint; raises CheckpointError that says which file is wrong, and how.

        `expected_sha256` is the manifest's in the run's record.
        """
        stored = self._read(step)
        if expected_sha256 is not None and stored.sha256 != expected_sha256:
            raise CheckpointError(
                f"{stored.uri}/{_MANIFEST} has SHA-256 {stored.sha256}, the run's record says {expected_sha256}: "
                f"it was changed or damaged"
            )
        for shard in stored.manifest.shards:
            self._check_size(step, shard)
            sha256 = self._sha256(step, shard)
            if sha256 != shard.sha256:
                raise CheckpointError(
                    f"{stored.uri}/{shard.file} has SHA-256 {sha256}, its manifest says {shard.sha256}: "
                    f"it was changed or damaged"
                )
        return stored

    def newest_verified(
        self,
        expected: Mapping[int, str],
        on_reject: Callable[[int, str, str], None],
        doubt: Callable[[Manifest], str],
    ) -> StoredCheckpoint | None:
        """The newest checkpoint that verifies, or None when none was ever completed.

        Every newer one is given to `on_reject(step, uri, problem)`. `expected` is the run's record, the manifest's
        SHA-256 by step. One that it does not list, since whoever was to write it down died first, is used if `doubt`
        finds nothing ("") against its manifest. Raises CheckpointError, having changed nothing, when there are
        checkpoints and none can be used: to start afresh then is for people to decide.
        """
        problems: list[str] = []
        for step in sorted(self.steps() | set(expected), reverse=True):
            if not self._is_there(step, _MANIFEST):
                if self._is_there(step, _SET_ASIDE):
                    continue  # that was told when it was done
                if step not in expected:
                    on_reject(step, self.uri(step), f"{self.uri(step)} {self._missing_manifest(step)}")
                    continue
            try:
                return self._verify_patiently(step, expected, doubt)
            except CheckpointError as error:
                problems.append(str(error))
                on_reject(step, self.uri(step), str(error))
        if problems:
            raise CheckpointError(
                f"none of the {len(problems)} checkpoints under {self._storage.uri}/{_ROOT} can be loaded; the newest: "
                f"{problems[0]}. Nothing was changed. Bring one of them back and submit again, or choose another "
                f"run.name to begin at step 0."
            )
        return None

    def take_newest(
        self,
        expected: Mapping[int, str],
        on_reject: Callable[[int, str, str], None],
        doubt: Callable[[Manifest], str],
    ) -> StoredCheckpoint | None:
        """`newest_verified`, to go on from it: what was rejected is set aside, once another is found or none was whole.

        When it raises nothing was changed.
        """
        rejected: list[int] = []

        def reject(step: int, uri: str, problem: str) -> None:
            on_reject(step, uri, problem)
            rejected.append(step)

        found = self.newest_verified(expected, reject, doubt)
        for step in rejected:
            self.set_aside(step)
        return found

    def set_aside(self, step: int) -> None:
        """Make it no checkpoint any more, as far as possible, and delete nothing of it.

        One that was rejected would else count among the newest that `prune` keeps, and be taken for the one that the
        run writes when it comes to this step again. To have it back, rename its manifest.rejected.json.
        """
        if self._storage.is_link(_folder(step)):
            return  # it never counts, and what it leads to is not this run's to change
        path = f"{_folder(step)}/{_MANIFEST}"
        with suppress(OSError):
            self._storage.write_atomic(f"{_folder(step)}/{_SET_ASIDE}", self._storage.read(path))
            self._storage.delete(path)

    def open(self, step: int) -> StateSource:
        """The state in this checkpoint, read range by range as it is asked for. Verify it first."""
        manifest = self._read(step).manifest

        def read(number: int, reads: Reads) -> None:
            shard = manifest.shards[number]
            try:
                self._read_ranges(step, shard, reads)
            except (OSError, CheckpointError) as error:
                raise CheckpointError(f"{self.uri(step)}/{shard.file} can't be read: {error}") from error

        return ShardedSource(manifest.scalars, {n: s.index for n, s in enumerate(manifest.shards)}, read)

    def prune(self, keep_last: int) -> tuple[int, ...]:
        """Delete all but the newest `keep_last` checkpoints and pinned ones, and unfinished ones older than the newest.

        Returns their steps.
        """
        complete = [stored.step for stored in self.list()]
        unfinished = self.steps() - set(complete)
        older = [step for step in complete[keep_last:] if not self._is_there(step, _PIN)]
        removed = older + [step for step in unfinished if complete and step < complete[0]]
        for step in sorted(removed):
            self.discard(step)
        return tuple(sorted(removed))

    def pin(self, step: int) -> bool:
        """Keep this checkpoint, whatever `prune` is told, until `unpin`; whether it is there."""
        if not self._storage.exists(f"{_folder(step)}/{_MANIFEST}"):
            return False
        self._storage.write_atomic(f"{_folder(step)}/{_PIN}", b"")
        if self._storage.exists(f"{_folder(step)}/{_MANIFEST}"):
            return True
        self.discard(step)  # it was being deleted
        return False

    def unpin(self, step: int) -> None:
        """Let `prune` delete it again."""
        self._storage.delete(f"{_folder(step)}/{_PIN}")

    def adopt(self, other: CheckpointStore, step: int, run: str) -> StoredCheckpoint:
        """Copy a checkpoint of another run, verified, and make it one of this run's. Raises CheckpointError.

        Costs two reads and a write of it; memory for a few MiB.
        """
        found = other.verify(step)
        for shard in found.manifest.shards:
            try:
                with other._storage.open_input(f"{_folder(step)}/{shard.file}") as file:
                    self._storage.write_stream(
                        f"{_folder(step)}/{shard.file}", iter(lambda: file.read(_CHUNK_BYTES), b"")
                    )
            except OSError as error:
                raise self._unwritten(step, shard.file, error) from error
        self.commit(replace(found.manifest, run=run))
        return self.verify(step)

    def discard(self, step: int) -> None:
        """Delete one checkpoint. The manifest goes first, so what is half deleted is no checkpoint any more."""
        if not self._storage.is_link(_folder(step)):
            self._storage.delete(f"{_folder(step)}/{_MANIFEST}")
        self._storage.delete(_folder(step))

    def abandon(self, step: int) -> None:
        """Delete what a write that failed has left, unless the checkpoint was completed before; as far as possible."""
        with suppress(OSError):
            if isinstance(next((found for found in self.scan() if found.step == step), None), Incomplete):
                self.discard(step)

    def _is_there(self, step: int, file: str) -> bool:
        try:
            return self._storage.exists(f"{_folder(step)}/{file}")
        except OSError:
            return True  # or may be: reading it tells

    def _verify_patiently(
        self, step: int, expected: Mapping[int, str], doubt: Callable[[Manifest], str]
    ) -> StoredCheckpoint:
        for pause_s in (*_PAUSES_S, None):
            try:
                if step not in expected and (problem := doubt(self._read(step).manifest)):
                    raise CheckpointError(f"{self.uri(step)} is not in the run's record, and {problem}")
                return self.verify(step, expected.get(step))
            except CheckpointUnreadableError:
                if pause_s is None:
                    raise
                time.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    def steps(self) -> set[int]:
        """Steps of which there is anything, whole or not."""
        matches = (_FOLDER.fullmatch(name) for name in self._storage.list(_ROOT))
        return {int(match[1]) for match in matches if match}

    def _missing_manifest(self, step: int) -> str:
        if self._is_there(step, _SET_ASIDE):
            return f"was found damaged, and the run went on without it: {_SET_ASIDE} is what was its {_MANIFEST}"
        return f"has no {_MANIFEST}: it was never completed"

    def _read(self, step: int) -> StoredCheckpoint:
        path = f"{_folder(step)}/{_MANIFEST}"
        self._refuse_link(_folder(step))
        self._refuse_link(path)
        try:
            content = self._storage.read(path)
            if self._signer is not None:
                self._signer.check(*split(content))
            manifest = Manifest.from_json(content)
        except FileNotFoundError:
            raise CheckpointError(f"{self.uri(step)} {self._missing_manifest(step)}") from None
        except OSError as error:
            raise CheckpointUnreadableError(f"{self.uri(step)}/{_MANIFEST} can't be read: {error}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{self.uri(step)}/{_MANIFEST} can't be used: {error}") from error
        if manifest.step != step:
            raise CheckpointError(f"{self.uri(step)}/{_MANIFEST} is that of step {manifest.step}")
        return self._stored(manifest, content)

    def _stored(self, manifest: Manifest, content: bytes) -> StoredCheckpoint:
        num_bytes = manifest.num_bytes + len(content)
        data, signature = split(content)
        sha256 = hashlib.sha256(data).hexdigest()
        signed: Signature = "none" if not signature else "unchecked" if self._signer is None else "valid"
        return StoredCheckpoint(manifest.step, self.uri(manifest.step), num_bytes, sha256, signed, manifest)

    def _check_size(self, step: int, shard: ShardEntry) -> None:
        path = f"{self.uri(step)}/{shard.file}"
        self._refuse_link(f"{_folder(step)}/{shard.file}")
        try:
            num_bytes = self._storage.num_bytes(f"{_folder(step)}/{shard.file}")
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} is not there. If the nodes have no storage in common, set run.storage to one that they have."
            ) from None
        except OSError as error:
            raise CheckpointUnreadableError(f"{path} can't be read: {error}") from error
        if num_bytes != shard.num_bytes:
            raise CheckpointError(f"{path} has {num_bytes} bytes, its manifest says {shard.num_bytes}: truncated")

    def _refuse_link(self, path: str) -> None:
        if self._storage.is_link(path):
            raise CheckpointError(f"{self._storage.uri}/{path} is a symbolic link: a checkpoint has none")

    def _sha256(self, step: int, shard: ShardEntry) -> str:
        digest = hashlib.sha256()
        try:
            with self._storage.open_input(f"{_folder(step)}/{shard.file}") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise CheckpointUnreadableError(f"{self.uri(step)}/{shard.file} can't be read: {error}") from error
        return digest.hexdigest()

    def _read_ranges(self, step: int, shard: ShardEntry, reads: Reads) -> None:
        with self._storage.open_input(f"{_folder(step)}/{shard.file}") as file:
            base = data_offset(file, shard.num_bytes, shard.index)
            for offset, view in reads:
                file.seek(base + offset * BYTES_PER_ELEMENT)
                _read_full(file, view)

    def _unwritten(self, step: int, file: str, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.uri(step)}/{file} can't be written: {error.strerror or error}. Free space there, lower "
            f"checkpoint.keep_last, or set run.storage to another folder or URI."
        )


def _folder(step: int) -> str:
    return f"{_ROOT}/step-{step:08d}"


def _read_full(file: Any, view: memoryview) -> None:
    while view:
        count = file.readinto(view)
        if not count:
            raise CheckpointError(f"it ends {len(view)} bytes too early")
        view = view[count:]
