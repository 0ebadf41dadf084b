"""The manifest of prepared data: what was made of which text, and how to know that it is whole.

A folder of prepared data holds token shards (`train-00000.arrow`, ..., `validation-00000.arrow`), a record beside each
(`train-00000.json`, written after the shard), `tokenizer.json`, and `manifest.json`, written last. Every file
is written under a passing name and renamed when it is on the disk, so a file that has its name is whole; SHA-256 tells
damage that came later. Checking costs one read of the shards, about 1 GB/s.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from elastictrain.data.tokenizer import TOKENIZER_NAME, Tokenizer
from elastictrain.errors import DataError, InfrastructureError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
PASSING_SUFFIX = ".tmp"

_SHARD_NAME = re.compile(r"(train|validation)-\d{5,}\.arrow")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One token shard, and the counts of the text that it was made of.

    Construction raises ValueError for a name that is no shard's (one that leads to another folder, say), and for
    fields of the wrong type: what is read from storage is not to be trusted.
    """

    name: str
    sha256: str
    """Of the file."""
    num_bytes: int
    """Of the file."""
    tokenizer_sha256: str
    num_samples: int
    num_tokens: int
    """Tokens of the text, `<|endoftext|>` included."""
    num_dropped_tokens: int
    """Tokens at the end that did not fill a sample."""
    num_text_bytes: int
    num_replaced: int
    """Pieces of text that were not UTF-8, read with U+FFFD for what could not be decoded."""

    def __post_init__(self) -> None:
        _check_types(self)
        if not _SHARD_NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is not the name of a token shard")
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"{self.name} has no SHA-256, but {self.sha256!r}")

    def to_json(self) -> dict[str, Any]:
        """Plain fields."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ShardRecord:
        """Inverse of `to_json`; raises KeyError, TypeError or ValueError for anything else."""
        return cls(**{f.name: data[f.name] for f in fields(cls)})

    @classmethod
    def load(cls, folder: Path, name: str) -> ShardRecord | None:
        """The record beside shard `name`; None where there is none or it is damaged."""
        try:
            record = cls.from_json(json.loads(_record_path(folder, name).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return record if record.name == name else None

    def save(self, folder: Path) -> None:
        """Write the record beside its shard."""
        with replacing(_record_path(folder, self.name)) as file:
            file.write(json.dumps(self.to_json()).encode())

    def is_intact(self, folder: Path) -> bool:
        """Whether the shard's file is there and has its digest."""
        path = folder / self.name
        return path.is_file() and path.stat().st_size == self.num_bytes and file_sha256(path) == self.sha256


@dataclass(frozen=True)
class Manifest:
    """Prepared data: everything that a reader needs to know."""

    folder: Path
    """Where it lies; not written."""
    fingerprint: str
    """Digest of what went in: the documents' names and contents, and the fields of the config that matter."""
    seq_len: int
    vocab_size: int
    """Tokens in the tokenizer: at most data.vocab_size."""
    tokenizer_sha256: str
    num_documents: int
    num_empty: int
    """Files without a byte in them, left out."""
    num_bytes: int
    """Of all documents."""
    train: tuple[ShardRecord, ...]
    validation: tuple[ShardRecord, ...]

    def __post_init__(self) -> None:
        _check_types(self)
        for split in ("train", "validation"):
            if wrong := [shard.name for shard in getattr(self, split) if not shard.name.startswith(f"{split}-")]:
                raise ValueError(f"{wrong[0]} is listed as a shard of {split}")
        if self.seq_len < 1 or self.vocab_size < 1:
            raise ValueError(f"seq_len {self.seq_len} and vocab_size {self.vocab_size} must be positive")

    @property
    def num_samples(self) -> int:
        """Training samples."""
        return sum(shard.num_samples for shard in self.train)

    @property
    def num_validation_samples(self) -> int:
        """Held-out samples, of which data.validation_samples are evaluated."""
        return sum(shard.num_samples for shard in self.validation)

    @property
    def num_tokens(self) -> int:
        """Tokens of the training text."""
        return sum(shard.num_tokens for shard in self.train)

    @property
    def num_dropped_tokens(self) -> int:
        """Tokens of the training text that are in no sample."""
        return sum(shard.num_dropped_tokens for shard in self.train)

    @property
    def num_replaced(self) -> int:
        """Pieces of text, training or held out, that were not UTF-8."""
        return sum(shard.num_replaced for shard in (*self.train, *self.validation))

    def sha256(self) -> str:
        """Digest of manifest.json, hex: equal digests mean equal tokens."""
        return sha256(self.to_json().encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the tokens are of."""
        try:
            return Tokenizer.load(self.folder / TOKENIZER_NAME)
        except DataError as error:
            raise DataError(f"{error}. Submit the run again to have it made anew.") from error

    def to_json(self) -> str:
        """The content of manifest.json."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "folder"}
        for split in ("train", "validation"):
            content[split] = [shard.to_json() for shard in content[split]]
        return json.dumps({"format_version": FORMAT_VERSION, **content}, indent=1) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of prepared data; raises DataError when there is none or it is damaged."""
        path = folder / MANIFEST_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format_version") != FORMAT_VERSION:
                raise DataError(f"{path} is of another version of this program. Remove {folder} to prepare it anew.")
            for split in ("train", "validation"):
                content[split] = tuple(ShardRecord.from_json(shard) for shard in content[split])
            return cls(folder, **content)
        except FileNotFoundError:
            raise DataError(f"there is no prepared data in {folder}: {path} is not there.") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path} is damaged: {error!r}. Remove {folder} to prepare it anew.") from None


def _check_types(record: ShardRecord | Manifest) -> None:
    """Texts are texts, and counts are counts."""
    for f in fields(record):
        value = getattr(record, f.name)
        if f.type == "str" and not isinstance(value, str):
            raise ValueError(f"{f.name} is {value!r}, no text")
        if f.type == "int" and (type(value) is not int or value < 0):
            raise ValueError(f"{f.name} is {value!r}, no count")


def _record_path(folder: Path, name: str) -> Path:
    return (folder / name).with_suffix(".json")


def file_sha256(path: Path) -> str:
    """Digest of a file's bytes, hex."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name when it is complete and on the disk, or never."""
    passing = path.with_name(f".{path.name}.{uuid4().hex}{PASSING_SUFFIX}")
    try:
        with passing.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        passing.replace(path)
    except OSError as error:
        raise InfrastructureError(
            f"can't write {path}: {error.strerror or error}. Prepared data goes under run.storage: "
            f"make room there, or choose another."
        ) from None
    finally:
        passing.unlink(missing_ok=True)
