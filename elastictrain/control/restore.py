"""Which state to go on from: the newest step of which every shard is somewhere in memory, else a durable one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
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


def newest_complete(
    found: Iterable[ShardAt], prefer: str = "", trusted: Mapping[int, int] | None = None
) -> MemoryState | None:
    """The first of `complete_states`."""
    return next(complete_states(found, prefer, trusted), None)


def complete_states(
    found: Iterable[ShardAt], prefer: str = "", trusted: Mapping[int, int] | None = None
) -> Iterator[MemoryState]:
    """What some generation holds completely: the highest step first, of equal steps the youngest generation's.

    Of several copies of a shard, one on node `prefer` is taken, else the first by node name. A generation in `trusted`
    counts up to the step given there.
    """
    groups: dict[tuple[int, int, int], dict[int, ShardAt]] = defaultdict(dict)
    usable = (shard for shard in found if is_trusted(trusted or {}, shard.generation, shard.step))
    for shard in sorted(usable, key=lambda s: (s.node != prefer, s.node)):
        groups[shard.step, shard.generation, shard.world_size].setdefault(shard.rank, shard)
    for (step, generation, world_size), ranks in sorted(groups.items(), reverse=True):
        if len(ranks) == world_size:
            yield MemoryState(generation, step, tuple(ranks[r] for r in range(world_size)))


def is_trusted(trusted: Mapping[int, int], generation: int, step: int) -> bool:
    """Whether this generation's state after `step` may be used."""
    return step <= trusted.get(generation, step)


def ring(zones: Mapping[str, str]) -> dict[str, str]:
    """Each node's buddy, from node -> zone: in another zone where that can be, and every node is the buddy of one.

    A single node has none. Nodes stand in a ring, zone by zone, the fullest first; the buddy stands as many places on
    as the fullest zone has nodes. So no node's buddy is in its own zone, unless one zone has more than half of the
    nodes, and then only as many as must.
    """
    size = Counter(zones.values())
    ordered = sorted(zones, key=lambda node: (-size[zones[node]], zones[node], node))
    if len(ordered) < 2:
        return {}
    fullest = size[zones[ordered[0]]]
    step = max(1, min(fullest, len(ordered) - fullest))
    return {node: ordered[(i + step) % len(ordered)] for i, node in enumerate(ordered)}
