"""Which rank does what, and which numbers of workers a split model can go on with."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.config import TrainConfig
from elastictrain.control.policy import policy_of
from elastictrain.data.order import SampleOrder
from elastictrain.errors import ConfigError
from elastictrain.plan.figures import figures_of
from elastictrain.plan.layout import Layout, Place, legal_world_sizes, plan_layout
from elastictrain.plan.model_shape import ModelShape
from elastictrain.plan.part import deal_blocks, part_of
from elastictrain.planning import plans_of

DEGREES = st.integers(1, 4)
FIGURES = figures_of([{"CPU": 4, "memory": 4e9}], {"CPU": 1}, None, 8)


@given(DEGREES, DEGREES, DEGREES, DEGREES)
def test_every_rank_has_a_place_of_its_own(dp: int, pp: int, tp: int, sp: int) -> None:
    layout = Layout(dp, 1, 1, 1, pp, tp, sp)
    places = [layout.place(rank) for rank in range(layout.world_size)]
    everywhere = product(range(pp), range(dp), range(sp), range(tp))
    assert [(p.pp, p.dp, p.sp, p.tp) for p in places] == list(everywhere)
    assert [layout.rank(place) for place in places] == list(range(layout.world_size))


def test_the_ranks_of_a_replica_read_the_same() -> None:
    order, layout = SampleOrder(100, 0), Layout(2, 1, 2, 3, pp=2)
    read = [order.micro_batches(5, layout, rank) for rank in range(4)]
    assert read[0] == read[2] != read[1] == read[3]
    assert sorted(m.global_index for part in read[:2] for m in part) == list(range(6))


@given(st.integers(1, 48), st.integers(1, 4), st.integers(1, 6), st.integers(1, 4), st.integers(1, 30))
def test_a_legal_world_has_a_layout_and_no_other_has(
    micro_batches: int, micro: int, pp: int, ep: int, world: int
) -> None:
    legal = world in legal_world_sizes(micro_batches * micro, micro, 1, 30, pp, ep)
    try:
        layout = plan_layout(world, global_batch=micro_batches * micro, micro_batch=micro, zero_stage=1, pp=pp, ep=ep)
    except ConfigError:
        assert not legal
    else:
        assert legal
        assert (layout.world_size, layout.global_batch) == (world, micro_batches * micro)


def test_what_does_not_come_out_whole_is_said_with_the_arithmetic() -> None:
    with pytest.raises(ConfigError, match=r"parallel.pp 4 x parallel.tp 1 = 4 workers. Set .* to 4 or 8"):
        plan_layout(6, global_batch=8, micro_batch=2, zero_stage=1, pp=4)
    with pytest.raises(ConfigError, match=r"Legal world sizes are 2, 4, 8"):
        plan_layout(6, global_batch=8, micro_batch=2, zero_stage=1, pp=2)
    with pytest.raises(ConfigError, match=r"3 / 2 = 1.5. Set elastic.max_workers to 2 or 4, or parallel.ep to a div"):
        plan_layout(3, global_batch=12, micro_batch=2, zero_stage=1, ep=2)


def test_control_knows_whole_replicas_only() -> None:
    """With three workers a pipeline of two stages runs on two, and has a spare."""
    elastic = {"max_workers": 4, "min_workers": 1}
    config = TrainConfig.from_dict({"parallel": {"layout": "manual", "pp": 2}, "elastic": elastic})
    policy = policy_of(config, plans_of(config, FIGURES, 2048), on_gpus=False)
    assert policy.world_sizes == (2, 4)
    assert [plan[4].layout.micro_batch for plan in policy.plans] == [4, 2, 1]


def test_control_knows_whole_groups_that_share_experts() -> None:
    config = TrainConfig.from_dict(
        {
            "model": {"num_experts": 4},
            "parallel": {"layout": "manual", "ep": 2},
            "elastic": {"max_workers": 4, "min_workers": 1},
        }
    )
    policy = policy_of(config, plans_of(config, FIGURES, 2048), on_gpus=False)
    assert policy.world_sizes == (2, 4)


@given(DEGREES, DEGREES, st.integers(1, 3))
def test_each_group_has_every_expert_once(groups: int, ep: int, each: int) -> None:
    layout, model = Layout(groups * ep, 1, 1, 1, ep=ep), shape(2, 100)
    for group in range(groups):
        held = [part_of(model, layout, group * ep + place).experts(ep * each) for place in range(ep)]
        assert [number for numbers in held for number in numbers] == list(range(ep * each))


def shape(num_layers: int, vocab_size: int) -> ModelShape:
    return ModelShape(num_layers, 64, 4, 4, 192, vocab_size, 32)


@given(st.integers(1, 40), st.integers(1, 100_000), st.data())
def test_no_deal_of_the_blocks_has_a_faster_slowest_stage(
    num_layers: int, vocab_size: int, data: st.DataObject
) -> None:
    model = shape(num_layers, vocab_size)
    pp = data.draw(st.integers(1, num_layers))
    dealt = deal_blocks(model, pp)
    assert sum(dealt) == num_layers
    assert len(dealt) == pp
    assert min(dealt) >= 1
    cuts = (
        sorted(data.draw(st.lists(st.integers(1, num_layers - 1), min_size=pp - 1, max_size=pp - 1, unique=True)))
        if pp > 1
        else []
    )
    other = [high - low for low, high in zip([0, *cuts], [*cuts, num_layers], strict=True)]
    head = model.head_flops_per_token / model.layer_flops_per_token(causal=True)
    assert max([*dealt[:-1], dealt[-1] + head]) <= max([*other[:-1], other[-1] + head])


def test_the_stage_with_a_large_head_gets_fewer_blocks() -> None:
    assert deal_blocks(shape(8, 100), 2) == (4, 4)
    assert deal_blocks(shape(8, 2000), 2) == (5, 3)


@given(st.integers(1, 12), st.data())
def test_the_parts_are_the_model(num_layers: int, data: st.DataObject) -> None:
    pp = data.draw(st.integers(1, num_layers))
    layout = Layout(1, 1, 1, 1, pp=pp)
    parts = [part_of(shape(num_layers, 5000), layout, rank) for rank in range(pp)]
    assert [block for part in parts for block in part.blocks] == list(range(num_layers))
    assert [part.first for part in parts] == [True] + [False] * (pp - 1)
    assert [part.last for part in parts] == [False] * (pp - 1) + [True]
    assert all(Place(rank, 0, 0) == layout.place(rank) for rank in range(pp))


@given(DEGREES)
def test_the_shares_of_a_sequence_are_the_sequence(sp: int) -> None:
    layout = Layout(1, 1, 1, 1, sp=sp)
    shares = [part_of(shape(4, 500), layout, rank).positions(4 * sp) for rank in range(sp)]
    assert [at for share in shares for at in share] == list(range(4 * sp))
