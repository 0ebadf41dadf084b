"""Who gets how many workers, and on which nodes (pure).

`share` divides the budget: every trial gets its smallest legal number of workers, in order, then whoever has fewest is
raised to its next legal number for as long as the budget lasts. `seat` gives these numbers places, and moves as few
workers as it can. Both are O(budget x trials). `grant` divides a cluster among sweeps by the same rule, in the order in
which they came, and takes nothing that another sweep has not given up yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def grant(claims: Mapping[str, Claim], name: str, nodes: Mapping[str, Mapping[str, float]]) -> dict[str, int]:
    """Slots by node that this sweep may use now; `nodes` has the resources of each, whoever uses them.

    Workers of all sweeps count alike, whatever they demand.
    """
    own = claims[name]
    others = [claim for other, claim in claims.items() if other != name]
    whole = {node: _slots(resources, own.demand) for node, resources in nodes.items()}
    sizes = {other: range(max(claim.fewest, 1), claim.workers + 1) for other, claim in claims.items()}
    part = share(sum(whole.values()), sizes)[name]
    free = {node: _slots(_left(node, resources, others), own.demand) for node, resources in nodes.items()}
    return {node: slots for node, slots in seat({name: part}, free, {name: own.held})[name].items() if slots}


def _left(node: str, resources: Mapping[str, float], others: Sequence[Claim]) -> dict[str, float]:
    return {
        kind: amount - sum(claim.held.get(node, 0) * claim.demand.get(kind, 0.0) for claim in others)
        for kind, amount in resources.items()
    }


def _slots(resources: Mapping[str, float], demand: Mapping[str, float]) -> int:
    return max(min(int((resources.get(kind, 0.0) + 1e-9) // amount) for kind, amount in demand.items()), 0)
