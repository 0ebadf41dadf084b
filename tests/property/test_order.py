"""What holds for the sample order, whatever the cluster does."""

from collections import Counter
from hashlib import sha256
from itertools import permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.data.order import EMPTY_CHAIN, SampleOrder, chain, cursor, dropout_seed
from elastictrain.plan.layout import Layout, legal_world_sizes, plan_layout

seeds = st.integers(0, 2**70)

GOLDEN_SAMPLES = [902, 907, 236, 545, 24, 615]
GOLDEN_DROPOUT = 17757837829359295861
GOLDEN_CHAIN = "675386ee21cb68b4d3ced690c6b7219666663c11e425e0e01da0f4eb8e1f8b43"


@st.composite
def histories(draw: st.DrawFn) -> tuple[SampleOrder, list[Layout]]:
    """An order, and the layout of each step of a run whose world size changes at step boundaries."""
    order = SampleOrder(draw(st.integers(1, 120)), draw(seeds))
    micro_batch = draw(st.integers(1, 4))
    global_batch = micro_batch * draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    worlds = st.sampled_from(legal_world_sizes(global_batch, micro_batch, 1, 12))
    layouts = [
        plan_layout(world, global_batch=global_batch, micro_batch=micro_batch, zero_stage=1)
        for world, steps in draw(st.lists(st.tuples(worlds, st.integers(1, 12)), min_size=1, max_size=6))
        for _ in range(steps)
    ]
    return order, layouts


def committed(order: SampleOrder, layouts: list[Layout], first_step: int = 1) -> list[int]:
    """All samples that the ranks compute, in the order of the global micro-batches of each step."""
    samples: list[int] = []
    for step, layout in enumerate(layouts, start=first_step):
        by_rank = [order.micro_batches(step, layout, rank) for rank in range(layout.dp)]
        assert {len(mine) for mine in by_rank} == {layout.accumulation}
        everything = {m.global_index: m.samples for mine in by_rank for m in mine}
        assert sorted(everything) == list(range(layout.dp * layout.accumulation))
        samples += [sample for g in sorted(everything) for sample in everything[g]]
    return samples


@given(histories())
def test_every_sample_once_per_epoch_over_any_world_sizes(history: tuple[SampleOrder, list[Layout]]) -> None:
    order, layouts = history
    samples = committed(order, layouts)
    n = order.num_samples
    for start in range(0, len(samples), n):
        epoch = samples[start : start + n]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(n))


@given(histories())
def test_global_batches_do_not_depend_on_the_world_size(history: tuple[SampleOrder, list[Layout]]) -> None:
    order, layouts = history
    batch = layouts[0].global_batch
    steps = [order.step_samples(step, batch) for step in range(1, len(layouts) + 1)]
    assert committed(order, layouts) == [sample for step in steps for sample in step]


@given(histories(), st.data())
def test_any_cursor_has_one_future(history: tuple[SampleOrder, list[Layout]], data: st.DataObject) -> None:
    order, layouts = history
    done = data.draw(st.integers(0, len(layouts)))
    again = SampleOrder(order.num_samples, order.seed)
    rest = committed(again, layouts[done:], first_step=done + 1)
    assert rest == committed(order, layouts)[cursor(done, layouts[0].global_batch) :]


@given(st.integers(1, 3000), seeds, st.integers(0, 2**40))
def test_each_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    order = SampleOrder(num_samples, seed)
    start = epoch * num_samples
    assert sorted(map(order.sample, range(start, start + num_samples))) == list(range(num_samples))


@given(st.integers(1, 2**62), seeds, st.integers(0, 2**80))
def test_any_length_at_any_position(num_samples: int, seed: int, position: int) -> None:
    assert 0 <= SampleOrder(num_samples, seed).sample(position) < num_samples


@given(seeds)
def test_epochs_and_seeds_differ(seed: int) -> None:
    first, again, other = SampleOrder(1000, seed), SampleOrder(1000, seed), SampleOrder(1000, seed + 1)
    epoch = first.step_samples(1, 1000)
    assert epoch == again.step_samples(1, 1000)
    assert epoch != first.step_samples(2, 1000)
    assert epoch != other.step_samples(1, 1000)


def test_the_shuffle_is_even() -> None:
    """Over 4,000 epochs of 10 samples each sample stands at each place about equally often (chi-square, 81 df)."""
    order, epochs = SampleOrder(10, 7), 4000
    seen = Counter((p % 10, order.sample(p)) for p in range(10 * epochs))
    expected = epochs / 10
    assert sum((seen[cell] - expected) ** 2 / expected for cell in product(range(10), repeat=2)) < 150


def test_small_epochs_take_every_order() -> None:
    orders = {tuple(SampleOrder(4, seed).step_samples(1, 4)) for seed in range(500)}
    assert orders == set(permutations(range(4)))


def test_the_order_is_fixed_for_ever() -> None:
    """Runs of an older version continue: these numbers may never change."""
    assert SampleOrder(1000, 0).step_samples(1, 6) == GOLDEN_SAMPLES
    assert dropout_seed(0, 1, 0) == GOLDEN_DROPOUT
    assert chain(EMPTY_CHAIN, [1, 2, 3]) == GOLDEN_CHAIN


def test_dropout_seeds_are_64_bits_and_differ() -> None:
    drawn = [dropout_seed(s, t, g) for s in range(3) for t in range(1, 50) for g in range(12)]
    assert len(set(drawn)) == len(drawn)
    assert 2**60 < max(drawn) < 2**64


def test_the_chain_is_what_it_says() -> None:
    first = sha256(bytes.fromhex(EMPTY_CHAIN) + (5).to_bytes(8, "little") + (0).to_bytes(8, "little")).hexdigest()
    assert chain(EMPTY_CHAIN, [5, 0]) == first
    assert chain(chain(EMPTY_CHAIN, [5]), [0]) != chain(chain(EMPTY_CHAIN, [0]), [5])


def test_there_is_no_step_zero_and_no_empty_order() -> None:
    with pytest.raises(ValueError, match="steps count from 1"):
        SampleOrder(10, 0).step_samples(0, 4)
    with pytest.raises(ValueError, match="at least one sample"):
        SampleOrder(0, 0)
