"""Where workers go, and which of them takes which rank."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush


def wanted_workers(
    *,
    nodes: Mapping[str, int],
    workers: Mapping[str, tuple[str, bool]],
    target: int,
    unreserved: int,
) -> list[tuple[str, bool]]:
    """The (node, reserved) of each worker to start so that `target` exist, as far as the cluster has room.

    `nodes` gives slots per node, `workers` the (node, reserved) of those that exist. At most `unreserved` workers may
    exist without a slot. The emptiest node comes first, by name among equals.
    """
    used = Counter(node for node, reserved in workers.values() if reserved)
    total = Counter(node for node, _ in workers.values())
    loose = sum(not reserved for _, reserved in workers.values())
    free = [(total[n], n) for n, slots in nodes.items() if used[n] < slots]
    heapify(free)
    orders: list[tuple[str, bool]] = []
    for _ in range(target - len(workers)):
        if free:
            count, node = heappop(free)
            used[node] += 1
            total[node] += 1
            if used[node] < nodes[node]:
                heappush(free, (count + 1, node))
            orders.append((node, True))
        elif nodes and loose < unreserved:
            node = min(nodes, key=lambda n: (total[n], n))
            total[node] += 1
            loose += 1
            orders.append((node, False))
    return orders


def crowded(places: Iterable[str], slots: Mapping[str, int]) -> int:
    """How many of the ranks on these nodes have no slot of their own, and share the processors of another rank."""
    return sum(max(count - slots.get(node, 0), 0) for node, count in Counter(places).items())


def assign_ranks(
    size: int, ready: Mapping[str, str], previous: Sequence[str], slots: Mapping[str, int]
) -> tuple[str, ...]:
    """Workers by rank, from `ready` (worker -> node, oldest first; at least `size` of them).

    Survivors of the previous generation come first and keep their rank where they can, so that their state is where
    they are. Others fill up from the emptiest node. No node gets more ranks than it has slots while another has room:
    of those that share a slot, the later ones give way.
    """
    survivors = [name for name in previous if name in ready]
    others = _from_the_emptiest(ready, survivors)
    load: Counter[str] = Counter()
    seated, sharing = list[str](), list[str]()
    for name in [*survivors, *others]:
        load[ready[name]] += 1
        (seated if load[ready[name]] <= slots.get(ready[name], 0) else sharing).append(name)
    chosen = [*seated, *sharing][:size]
    kept = set(chosen)
    ranks = {rank: name for rank, name in enumerate(previous[:size]) if name in kept}
    placed = set(ranks.values())
    rest = iter([name for name in chosen if name not in placed])
    for rank in range(size):
        if rank not in ranks:
            ranks[rank] = next(rest)
    return tuple(ranks[rank] for rank in range(size))


def _from_the_emptiest(ready: Mapping[str, str], taken: Sequence[str]) -> Iterator[str]:
    """Who is not taken, always from the node with the fewest taken so far."""
    load, known = Counter(ready[name] for name in taken), set(taken)
    waiting: dict[str, deque[str]] = defaultdict(deque)
    for name, node in ready.items():
        if name not in known:
            waiting[node].append(name)
    emptiest = [(load[node], node) for node in waiting]
    heapify(emptiest)
    while emptiest:
        count, node = heappop(emptiest)
        yield waiting[node].popleft()
        if waiting[node]:
            heappush(emptiest, (count + 1, node))


def seat_together(ranks: Sequence[str], nodes: Mapping[str, str], size: int) -> tuple[str, ...]:
    """These workers in an order in which as many blocks of `size` ranks as can be have one node each.

    Blocks that have one already stay where they are.
    """
    if size == 1:
        return tuple(ranks)
    blocks = [tuple(ranks[start : start + size]) for start in range(0, len(ranks), size)]
    scattered = [number for number, block in enumerate(blocks) if len({nodes[name] for name in block}) > 1]
    by_node: dict[str, list[str]] = defaultdict(list)
    for number in scattered:
        for name in blocks[number]:
            by_node[nodes[name]].append(name)
    whole, rest = list[str](), list[str]()
    for names in by_node.values():
        most = len(names) // size * size
        whole += names[:most]
        rest += names[most:]
    dealt = iter([*whole, *rest])
    for number in scattered:
        blocks[number] = tuple(next(dealt) for _ in blocks[number])
    return tuple(name for block in blocks for name in block)
