"""How a sweep divides its workers: within the budget, legal, even, with nothing left over and nobody moved about."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from elastictrain.sweep.share import Claim, Taken, grant, seat, share

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True).map(sorted)
TRIALS = st.dictionaries(st.sampled_from("abcdef"), SIZES, max_size=6)
NODES = st.dictionaries(st.sampled_from(["n1", "n2", "n3", "n4"]), st.integers(0, 6), max_size=4)


@given(st.integers(0, 24), TRIALS)
def test_the_budget_is_used_up_evenly(budget: int, sizes: dict[str, list[int]]) -> None:
    shares = share(budget, sizes)
    left = budget - sum(shares.values())
    assert left >= 0
    assert list(shares) == list(sizes)
    for trial, number in shares.items():
        legal = sizes[trial]
        assert number in (0, *legal)
        larger = [n for n in legal if n > number]
        assert not number or not larger or larger[0] - number > left, "what is left is of no use to anybody"
        assert number or legal[0] > left
        for other, own in shares.items():
            smaller = [n for n in sizes[other] if n < own]
            if number and smaller and larger:
                assert smaller[-1] <= number or larger[0] - number > left, "nobody was raised before one with less"


@given(st.integers(1, 12), st.lists(st.sampled_from("abcdef"), unique=True, min_size=1, max_size=6))
def test_trials_alike_get_alike(budget: int, names: list[str]) -> None:
    shares = share(budget, {name: range(1, 13) for name in names})
    some = [number for number in shares.values() if number]
    assert sum(some) == budget
    assert max(some) - min(some) <= 1
    assert [bool(number) for number in shares.values()] == sorted(map(bool, shares.values()), reverse=True)


@given(TRIALS, NODES, st.data())
def test_a_change_moves_no_more_workers_than_it_must(
    sizes: dict[str, list[int]], slots: dict[str, int], data: st.DataObject
) -> None:
    room = sum(slots.values())
    held = seat(share(room, sizes), slots, {})
    budget = data.draw(st.integers(0, room))
    others = {trial: legal for trial, legal in sizes.items() if data.draw(st.booleans())}
    shares = share(budget, others)
    seats = seat(shares, slots, held)
    assert {trial: sum(nodes.values()) for trial, nodes in seats.items()} == shares
    for node, count in slots.items():
        assert sum(nodes.get(node, 0) for nodes in seats.values()) <= count
    for trial, nodes in seats.items():
        stay = sum(min(count, held[trial].get(node, 0)) for node, count in nodes.items())
        assert stay == min(shares[trial], sum(held[trial].values())), "who keeps its number stays where it is"


@given(
    st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 8), st.integers(1, 3)), min_size=1, max_size=4),
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=12),
)
def test_sweeps_share_a_cluster_and_never_a_slot(
    wanted: dict[str, tuple[int, int]], slots: list[int], turns: list[tuple[str, bool]]
) -> None:
    """Each renews its claim when it likes, and may end; when all have renewed some times, the rule holds."""
    nodes = {f"n{number}": {"CPU": 2.0 * count, "memory": 1.0} for number, count in enumerate(slots)}
    claims: dict[str, Claim] = {}
    for name, stays in [*turns, *((name, True) for name in 4 * [*wanted])]:
        if name not in wanted:
            continue
        if not stays:
            claims.pop(name, None)
            continue
        workers, fewest = wanted[name]
        before = claims.get(name)
        claims[name] = Claim(workers, fewest, {"CPU": 2.0}, before.held if before else {})
        claims[name] = replace(claims[name], held=grant(claims, name, nodes))
        for node, count in zip(nodes, slots):
            assert sum(claim.held.get(node, 0) for claim in claims.values()) <= count
    shares = share(sum(slots), {name: range(wanted[name][1], wanted[name][0] + 1) for name in claims})
    assert {name: sum(claim.held.values()) for name, claim in claims.items()} == shares


@given(
    st.dictionaries(st.sampled_from("abc"), st.tuples(st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=3),
    st.booleans(),
)
def test_an_ordinary_run_goes_first_but_for_one_trial_of_each_sweep(
    wanted: dict[str, tuple[int, int]], slots: list[tuple[int, int]], sweeps_are_first: bool
) -> None:
    """A run takes what is free of what it wants on each node, and waits for the rest; sweeps renew in turns."""
    nodes = {f"n{number}": {"CPU": 2.0 * count} for number, (count, _) in enumerate(slots)}
    room = {f"n{number}": count for number, (count, _) in enumerate(slots)}
    wants = {f"n{number}": min(count, want) for number, (count, want) in enumerate(slots)}
    claims = {name: Claim(max(most, least), least, {"CPU": 2.0}, {}) for name, (most, least) in wanted.items()}
    run = dict.fromkeys(nodes, 0)

    def turns(wants: dict[str, int]) -> None:
        for name in 5 * [*claims]:
            for node, count in room.items():
                free = count - run[node] - sum(claim.held.get(node, 0) for claim in claims.values())
                assert free >= 0
                run[node] += min(free, wants[node] - run[node])
            taken = [Taken("run", n, {"CPU": 2.0}, k >= run[n]) for n, want in wants.items() for k in range(want)]
            claims[name] = replace(claims[name], held=grant(claims, name, nodes, taken))

    if sweeps_are_first:
        turns(dict.fromkeys(nodes, 0))
    before = dict(claims)
    turns(wants)
    held = {name: sum(claim.held.values()) for name, claim in claims.items()}
    left = sum(room.values()) - sum(wants.values())
    kept = share(sum(room.values()), {name: [claim.fewest] for name, claim in claims.items()})
    assert sum(wants.values()) - sum(run.values()) <= max(sum(kept.values()) - left, 0)
    assert sum(held.values()) <= max(left, sum(kept.values()))
    for name, claim in claims.items():
        assert not before[name].held or held[name] >= claim.fewest, "no sweep loses its last trial"
    if not sweeps_are_first:
        sizes = {name: range(claim.fewest, claim.workers + 1) for name, claim in claims.items()}
        assert run == wants
        assert held == share(left, sizes)
