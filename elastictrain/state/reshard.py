"""Resharding as the intersection of two layouts: which ranges to copy from which shard, and proof that none is missing.

One sweep over sorted ranges per tensor: O((F + T) log F) for F stored and T wanted fragments; no data is touched.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastictrain.errors import CheckpointError
from elastictrain.state.tensors import Fragment, ShardIndex


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy `numel` elements from element `source_offset` of shard `shard` to `target_offset` of wanted[`target`]."""

    shard: int
    source_offset: int
    target: int
    target_offset: int
    numel: int


def plan_copies(shards: Mapping[int, ShardIndex], wanted: Sequence[Fragment]) -> list[Copy]:
    """The copies that fill every wanted fragment from the shards, each element once.

    Where shards overlap (replicas), the first that reaches furthest serves. Raises CheckpointError, naming the
    tensor and the range, when a wanted element is in no shard.
    """
    stored: dict[str, list[tuple[int, int, int, int]]] = defaultdict(list)
    for shard, index in shards.items():
        for fragment, offset in zip(index.fragments, index.offsets, strict=True):
            if fragment.numel:
                stored[fragment.tensor].append((fragment.start, fragment.stop, shard, offset))
    furthest: dict[str, tuple[list[int], list[tuple[int, int, int, int]]]] = {}
    for tensor, ranges in stored.items():
        ranges.sort(key=lambda r: (r[0], -r[1], r[2]))
        kept: list[tuple[int, int, int, int]] = []
        for candidate in ranges:
            if not kept or candidate[1] > kept[-1][1]:
                kept.append(candidate)
        furthest[tensor] = ([r[0] for r in kept], kept)

    copies: list[Copy] = []
    for target, want in enumerate(wanted):
        starts, ranges = furthest.get(want.tensor, ([], []))
        position = want.start
        while position < want.stop:
            at = bisect_right(starts, position) - 1
            if at < 0 or ranges[at][1] <= position:
                raise CheckpointError(
                    f"state is incomplete: no shard holds {want.tensor}[{position}:{want.stop}] (flat elements)"
                )
            start, stop, shard, offset = ranges[at]
            numel = min(stop, want.stop) - position
            copies.append(Copy(shard, offset + position - start, target, position - want.start, numel))
            position += numel
    return copies
