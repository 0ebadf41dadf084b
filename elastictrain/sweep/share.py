"""Who gets how many workers, and on which nodes (pure).

`share` divides the budget: every trial gets its smallest legal number of workers, in order, then whoever has fewest is
raised to its next legal number for as long as the budget lasts. `seat` gives these numbers places, and moves as few
workers as it can. Both are O(budget x trials). `grant` divides a cluster among sweeps by the same rule, in the order in
which they came, and takes nothing that another sweep has not given up yet. Ordinary runs go first: what they hold is no
sweep's, and what they wait for is given up to them, down to what one trial of each sweep needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Seats = Mapping[str, Mapping[str, int]]
"""Slots by node, by trial."""


def share(budget: int, sizes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Workers of each trial, from its legal numbers (ascending); 0 for those for which nothing is left."""
    shares, left = dict.fromkeys(sizes, 0), budget
    for trial, legal in sizes.items():
        if legal and legal[0] <= left:
            shares[trial] = legal[0]
            left -= legal[0]
    while raises := [
        (shares[trial], larger - shares[trial], trial)
        for trial, legal in sizes.items()
        if shares[trial] and (larger := _next(legal, shares[trial])) - shares[trial] <= left and larger
    ]:
        _, more, trial = min(raises, key=lambda r: r[:2])  # the first of equals
        shares[trial] += more
        left -= more
    return shares


def _next(legal: Sequence[int], size: int) -> int:
    """The next larger legal number; 0 for none."""
    return min((n for n in legal if n > size), default=0)


def seat(shares: Mapping[str, int], slots: Mapping[str, int], held: Seats) -> dict[str, dict[str, int]]:
    """Slots by node for each trial; `slots` are those of the cluster, `held` those that trials have now.

    A trial keeps what it holds, as far as its share and the node's slots go. More comes from the emptiest nodes.
    """
    free, seats = dict(slots), {trial: dict[str, int]() for trial in shares}
    for trial, number in shares.items():
        for node, count in sorted(held.get(trial, {}).items(), key=lambda item: (-item[1], item[0])):
            kept = min(count, free.get(node, 0), number - sum(seats[trial].values()))
            if kept > 0:
                seats[trial][node] = kept
                free[node] -= kept
    for trial, number in shares.items():
        for _ in range(number - sum(seats[trial].values())):
            node = max(sorted(free), key=lambda n: free[n], default="")
            if free.get(node, 0) > 0:
                seats[trial][node] = seats[trial].get(node, 0) + 1
                free[node] -= 1
    return seats


@dataclass(frozen=True, slots=True)
class Claim:
    """What one sweep says of itself."""

    workers: int
    """That it could use now, within its budget."""
    fewest: int
    """Of any use to it."""
    demand: Mapping[str, float]
    """What Ray reserves for a worker."""
    held: Mapping[str, int]
    """Its slots by node, until it says otherwise."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What somebody who is no sweep holds on a node, or waits for there."""

    run: str
    node: str
    demand: Mapping[str, float]
    waits: bool


def grant(
    claims: Mapping[str, Claim], name: str, nodes: Mapping[str, Mapping[str, float]], taken: Sequence[Taken] = ()
) -> dict[str, int]:
    """Slots by node that this sweep may use now; `nodes` has the resources of each, whoever uses them.

    Workers of all sweeps count alike, whatever they demand.
    """
    own = claims[name]
    others = [(n, claim.demand, held) for o, claim in claims.items() if o != name for n, held in claim.held.items()]
    lost = [(t.node, t.demand, 1) for t in taken if not t.waits]
    awaited = [(t.node, t.demand, 1) for t in taken if t.waits]
    whole, left = (sum(_free(nodes, own.demand, used).values()) for used in (lost, lost + awaited))
    sizes = {other: range(max(claim.fewest, 1), claim.workers + 1) for other, claim in claims.items()}
    kept = sum(share(whole, {other: legal[:1] for other, legal in sizes.items()}).values())
    part = share(max(left, kept), sizes)[name]
    free = _free(nodes, own.demand, lost + awaited + others)
    room = _free(nodes, own.demand, lost + others)
    for node in sorted(nodes, key=lambda n: -own.held.get(n, 0)):  # what one trial needs is not given up
        missing = min(part, own.fewest) - sum(free.values())
        free[node] += max(min(missing, room[node] - free[node]), 0)
    return {node: slots for node, slots in seat({name: part}, free, {name: own.held})[name].items() if slots}


def _free(
    nodes: Mapping[str, Mapping[str, float]],
    demand: Mapping[str, float],
    used: Iterable[tuple[str, Mapping[str, float], int]],
) -> dict[str, int]:
    """Slots by node beside what is used there: node, demand, and how many times."""
    left = {node: dict(resources) for node, resources in nodes.items()}
    for node, of_each, number in used:
        for kind, amount in of_each.items():
            if node in left:
                left[node][kind] = left[node].get(kind, 0.0) - number * amount
    return {node: _slots(resources, demand) for node, resources in left.items()}


def _slots(resources: Mapping[str, float], demand: Mapping[str, float]) -> int:
    return max(min(int((resources.get(kind, 0.0) + 1e-9) // amount) for kind, amount in demand.items()), 0)
