"""The vocabulary of state: logical tensors, the fragments of them that a rank holds, and the shard they form.

A logical tensor is one fp32 array of the whole model, unsharded, named `<part>/<parameter>` with part one of
`PARTS`. A rank holds *fragments*: flat ranges of logical tensors. Its shard is the fragments laid end to end in one
fp32 buffer, in the order of `ShardIndex.fragments`. Nothing here knows of ZeRO, padding or engines: those are undone
by whoever exports and redone by whoever imports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

PARTS = ("param", "exp_avg", "exp_avg_sq")
"""The parts of AdamW's state: fp32 master weight, first and second moment (Kingma & Ba 2015, algorithm 1)."""

BYTES_PER_ELEMENT = 4


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """One whole tensor of the model's state, fp32."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class Fragment:
    """The flat range [start, start + numel) of the logical tensor `tensor`."""

    tensor: str
    start: int
    numel: int

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.numel


@dataclass(frozen=True)
class ShardIndex:
    """What one rank's shard holds, in the order in which its buffer holds it."""

    fragments: tuple[Fragment, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Element offset of each fragment in the shard's buffer."""
        return tuple(accumulate((f.numel for f in self.fragments), initial=0))[:-1]

    @property
    def numel(self) -> int:
        """Elements in the buffer."""
        return sum(f.numel for f in self.fragments)

    @property
    def num_bytes(self) -> int:
        """Size of the buffer, fp32."""
        return self.numel * BYTES_PER_ELEMENT

    def to_json(self) -> list[list[Any]]:
        """A list of [tensor, start, numel]."""
        return [[f.tensor, f.start, f.numel] for f in self.fragments]

    @classmethod
    def from_json(cls, rows: list[list[Any]]) -> ShardIndex:
        """Inverse of `to_json`; raises ValueError for a row that is no fragment."""
        fragments = []
        for row in rows:
            tensor, start, numel = row
            if not isinstance(tensor, str) or not isinstance(start, int) or not isinstance(numel, int):
                raise ValueError(f"not a fragment: {row!r}")
            if start < 0 or numel < 0:
                raise ValueError(f"a fragment may not be negative: {row!r}")
            fragments.append(Fragment(tensor, start, numel))
        return cls(tuple(fragments))


@dataclass(frozen=True)
class ShardHeader:
    """One committed snapshot of one rank: whose it is, of when, and how to know that it is whole."""

    generation: int
    step: int
    rank: int
    world_size: int
    checksum: str
    """xxh3_64 of the buffer's bytes, hex."""
    scalars: Mapping[str, int | float]
    """State that is no tensor: `optimizer_step`, and the loss scale where there is one."""
    note: str = ""
    """Text that travels with the shard, opaque here: the runtime's records of the steps since the last snapshot."""
