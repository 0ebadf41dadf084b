"""Which state to go on from: the newest step of which every shard is somewhere in memory, else a durable one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ShardAt:
    """One verified shard in the memory of one keeper."""

    generation: int
    step: int
    rank: int
    world_size: int
    node: str


@dataclass(frozen=True, slots=True)
class MemoryState:
    """A step whose shards are all there: rank i's is `shards[i]`."""

    generation: int
    step: int
    shards: tuple[ShardAt, ...]


def newest_complete(found: Iterable[ShardAt], prefer: str = "") -> MemoryState | None:
    """The highest step that some generation holds completely; of equal steps, the youngest generation's.

    Of several copies of a shard, one on node `prefer` is taken, else the first by node name.
    """
    groups: dict[tuple[int, int, int], dict[int, ShardAt]] = defaultdict(dict)
    for shard in sorted(found, key=lambda s: (s.node != prefer, s.node)):
        groups[shard.step, shard.generation, shard.world_size].setdefault(shard.rank, shard)
    for (step, generation, world_size), ranks in sorted(groups.items(), reverse=True):
        if len(ranks) == world_size:
            return MemoryState(generation, step, tuple(ranks[r] for r in range(world_size)))
    return None


def ring(nodes: Iterable[str]) -> dict[str, str]:
    """Each node's buddy: the next one in name order. A single node has none."""
    ordered = sorted(set(nodes))
    if len(ordered) < 2:
        return {}
    return {node: ordered[(i + 1) % len(ordered)] for i, node in enumerate(ordered)}
