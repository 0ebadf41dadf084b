"""Whoever's memory changed is accused, nobody else is, and a state is trusted only if something vouches for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from elastictrain.control.verdict import Claim, Evidence, judge, trusted_step

WELL = Evidence(changed="", snapshot_holds=True, weights_follow=True)


def claims(world_size: int) -> list[Claim]:
    """Two slices for every owner; the digest names the slice."""
    return [Claim("embed.weight", 10 * n, 10, n % world_size, f"right {n}") for n in range(2 * world_size)]


def all_well(world_size: int) -> list[Evidence]:
    """What ranks with the same weights say."""
    return [replace(WELL, seen=tuple(c.digest for c in claims(world_size)))] * world_size


def with_flips(world_size: int, flips: set[tuple[int, int]]) -> list[Evidence]:
    """As above, but for these (rank, slice): each flip gives bytes that nobody else has."""
    return [
        replace(
            told,
            seen=tuple(f"flip {rank} {n}" if (rank, n) in flips else digest for n, digest in enumerate(told.seen)),
        )
        for rank, told in enumerate(all_well(world_size))
    ]


worlds = st.integers(2, 6)


@given(st.integers(1, 6))
def test_all_is_well(world_size: int) -> None:
    assert judge(claims(world_size), all_well(world_size)) is None
    assert judge([], [WELL] * world_size) is None


@given(worlds, st.data())
def test_flipped_weights_accuse_their_ranks_alone_and_leave_the_snapshot_sound(world_size: int, data: st.DataObject):
    flip = st.tuples(st.integers(0, world_size - 1), st.integers(0, 2 * world_size - 1))
    flips = data.draw(st.sets(flip, min_size=1))
    crowded = [n for n, count in Counter(n for _, n in flips).items() if count == world_size]
    verdict = judge(claims(world_size), with_flips(world_size, flips))
    assert verdict is not None
    told = {rank for rank, n in flips if n not in crowded}
    assert set(verdict.ranks) == told, "the owner's masters vouch for what at least one rank still has"
    assert verdict.snapshot_sound == (not crowded)
    assert any(f"rank {rank}" in verdict.problem for rank in told) or not told


@given(worlds, st.data())
def test_a_changed_shard_accuses_its_rank_and_its_word_on_weights_counts_no_more(world_size: int, data: st.DataObject):
    odd = data.draw(st.integers(0, world_size - 1))
    told = all_well(world_size)
    told[odd] = replace(told[odd], changed="param")
    wrong = [replace(c, digest="from changed masters") if c.owner == odd else c for c in claims(world_size)]
    verdict = judge(wrong, told)
    assert verdict is not None
    assert verdict.ranks == (odd,)
    assert verdict.snapshot_sound, "the snapshot was made before"


@given(worlds, st.data())
def test_a_snapshot_that_differs_is_not_trusted(world_size: int, data: st.DataObject) -> None:
    odd = data.draw(st.integers(0, world_size - 1))
    told = all_well(world_size)
    told[odd] = replace(told[odd], snapshot_holds=False, changed=data.draw(st.sampled_from(["", "param"])))
    verdict = judge(claims(world_size), told)
    assert verdict is not None
    assert verdict.ranks == (odd,)
    assert not verdict.snapshot_sound


def test_of_two_ranks_the_one_that_the_masters_agree_with_is_right() -> None:
    for odd in (0, 1):
        for n in range(4):
            verdict = judge(claims(2), with_flips(2, {(odd, n)}))
            assert verdict is not None
            assert verdict.ranks == (odd,)
            assert (
                verdict.problem == f"embed.weight[{10 * n}:{10 * n + 10}] of rank {odd} differs from the other ranks'"
            )


def test_of_two_ranks_nobody_is_accused_when_the_masters_agree_with_neither() -> None:
    wrong = [replace(c, digest="neither") if c.start == 0 else c for c in claims(2)]
    verdict = judge(wrong, with_flips(2, {(1, 0)}))
    assert verdict is not None
    assert verdict.ranks == ()
    assert not verdict.snapshot_sound


def test_masters_that_do_not_give_the_weights_of_all_are_wrong_themselves() -> None:
    wrong = [replace(c, digest="odd") if c.start == 10 else c for c in claims(3)]
    verdict = judge(wrong, all_well(3))
    assert verdict is not None
    assert verdict.ranks == (1,)
    assert not verdict.snapshot_sound


@given(st.integers(0, 50), st.integers(1, 10), st.integers(0, 50), st.booleans())
def test_the_trusted_step(restored: int, every: int, done: int, sound: bool) -> None:
    step = restored + done
    trusted = trusted_step(step, every, restored, sound)
    assert restored <= trusted <= step
    assert step - trusted <= every
    if sound and every == 1:
        assert trusted == step, "nothing finished is lost"
    elif done >= every:
        assert trusted == step - every, "the last state that verified"
