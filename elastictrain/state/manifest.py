"""What a durable checkpoint says about itself: which state, of when, in which files, and how to know they are whole.

A `Manifest` that exists is valid: construction checks that file names are plain shard names, that every fragment lies
inside a known tensor, and that the shards together hold every element of every tensor. It depends on no layout but
its own shards', so any other layout can read it. `from_json` takes untrusted bytes. Cost: O(F log F) in fragments.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from elastictrain.errors import CheckpointError
from elastictrain.state.reshard import plan_copies
from elastictrain.state.tensors import Fragment, LogicalTensor, ShardIndex

FORMAT_VERSION = 1

_FILE_NAME = re.compile(r"shard-\d{5}-of-\d{5}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardEntry:
    """One shard file of a checkpoint."""

    file: str
    num_bytes: int
    sha256: str
    index: ShardIndex


@dataclass(frozen=True)
class Manifest:
    """A durable checkpoint: the state after `step` steps, when `samples` samples had been consumed."""

    run: str
    step: int
    samples: int
    sample_chain: str
    """Digest of all samples so far (events.StepCommitted)."""
    loss: float
    """Of the last step; NaN is allowed, and is null in JSON."""
    layout: Mapping[str, Any]
    """The layout that wrote it, for people; reading needs only the shards' indexes."""
    scalars: Mapping[str, int | float]
    tensors: tuple[LogicalTensor, ...]
    shards: tuple[ShardEntry, ...]
    created_at: float
    """Unix time, seconds."""
    format_version: int = field(default=FORMAT_VERSION, init=False)

    def __post_init__(self) -> None:
        if self.step < 0 or self.samples < 0:
            raise CheckpointError(f"manifest has step {self.step} and samples {self.samples}: neither may be negative")
        for shard in self.shards:
            _check_shard(shard)
        _refuse_twice("shard file", [shard.file for shard in self.shards])
        _refuse_twice("tensor", [tensor.name for tensor in self.tensors])
        self._check_coverage()

    @property
    def num_bytes(self) -> int:
        """Size of all shard files."""
        return sum(shard.num_bytes for shard in self.shards)

    def _check_coverage(self) -> None:
        sizes = {tensor.name: tensor.numel for tensor in self.tensors}
        for shard in self.shards:
            for fragment in shard.index.fragments:
                numel = sizes.get(fragment.tensor)
                if numel is None or fragment.stop > numel:
                    raise CheckpointError(
                        f"manifest says that {shard.file} holds {fragment.tensor}[{fragment.start}:{fragment.stop}], "
                        + ("but lists no such tensor" if numel is None else f"but that tensor has {numel} elements")
                    )
        wanted = [Fragment(tensor.name, 0, tensor.numel) for tensor in self.tensors]
        plan_copies({number: shard.index for number, shard in enumerate(self.shards)}, wanted)

    def to_json(self) -> str:
        """One JSON object; `from_json` gives an equal manifest back."""
        data = {
            "format_version": self.format_version,
            "run": self.run,
            "step": self.step,
            "samples": self.samples,
            "sample_chain": self.sample_chain,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "layout": dict(self.layout),
            "scalars": dict(self.scalars),
            "tensors": [[tensor.name, list(tensor.shape)] for tensor in self.tensors],
            "shards": [
                {"file": s.file, "num_bytes": s.num_bytes, "sha256": s.sha256, "index": s.index.to_json()}
                for s in self.shards
            ],
            "created_at": self.created_at,
        }
        return json.dumps(data, allow_nan=False, separators=(",", ":"), sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Parse and validate; raises CheckpointError that says what is wrong."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"manifest is not JSON: {error}") from None
        version = _field(data, "format_version", int)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"manifest has format_version {version}, this program reads {FORMAT_VERSION}: "
                f"use the version of elastictrain that wrote it"
            )
        loss = data.get("loss")
        return cls(
            run=_field(data, "run", str),
            step=_field(data, "step", int),
            samples=_field(data, "samples", int),
            sample_chain=_field(data, "sample_chain", str),
            loss=math.nan if loss is None else _number(loss, "loss"),
            layout=_field(data, "layout", dict),
            scalars={key: _number(value, key) for key, value in _field(data, "scalars", dict).items()},
            tensors=tuple(_tensor(row) for row in _field(data, "tensors", list)),
            shards=tuple(_shard(entry) for entry in _field(data, "shards", list)),
            created_at=_number(data.get("created_at"), "created_at"),
        )


def _check_shard(shard: ShardEntry) -> None:
    if not _FILE_NAME.fullmatch(shard.file):
        raise CheckpointError(f"manifest names {shard.file!r}, which is not a shard-NNNNN-of-NNNNN.safetensors")
    if not _SHA256.fullmatch(shard.sha256):
        raise CheckpointError(f"manifest has no SHA-256 for {shard.file}, but {shard.sha256!r}")
    if shard.num_bytes < shard.index.num_bytes:
        raise CheckpointError(
            f"manifest says that {shard.file} has {shard.num_bytes} bytes, but its fragments need "
            f"{shard.index.num_bytes}"
        )


def _refuse_twice(what: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise CheckpointError(f"manifest names the {what} {name} twice")
        seen.add(name)


def _field(data: Any, key: str, kind: type[Any]) -> Any:
    if not isinstance(data, dict):
        raise CheckpointError(f"manifest has a {type(data).__name__} where an object should be")
    if key not in data:
        raise CheckpointError(f"manifest has no {key}")
    value = data[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CheckpointError(f"manifest has {key} {value!r}, which is not of type {kind.__name__}")
    return value


def _number(value: Any, key: str) -> Any:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"manifest has {key} {value!r}, which is no number")
    return value


def _tensor(row: Any) -> LogicalTensor:
    match row:
        case [str(name), list(shape)] if all(type(size) is int and size >= 0 for size in shape):
            return LogicalTensor(name, tuple(shape))
    raise CheckpointError(f"manifest has {row!r} where a tensor [name, shape] should be")


def _shard(entry: Any) -> ShardEntry:
    try:
        index = ShardIndex.from_json(_field(entry, "index", list))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"manifest has a wrong shard index: {error}") from None
    return ShardEntry(_field(entry, "file", str), _field(entry, "num_bytes", int), _field(entry, "sha256", str), index)
