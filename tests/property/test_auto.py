"""`parallel.layout: auto` over random models, machines and wishes: what it chooses, and what it falls back on."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_planner import cluster_of, dtypes, shapes

from elastictrain.plan.auto import Asked, Plans, as_asked, planned, relief, rung_of
from elastictrain.plan.choose import Job, NothingFits, fits, weigh
from elastictrain.plan.cluster import Dtype
from elastictrain.plan.figures import Figures, figures_of, gpu_named
from elastictrain.plan.layout import Layout
from elastictrain.plan.model_shape import ModelShape
from elastictrain.plan.space import RECOMPUTES, Candidate

HIGH = 8
wishes = st.builds(
    Asked,
    global_batch=st.sampled_from([8, 24]),
    micro_batch=st.sampled_from([1, 2, 4]),
    zero_stage=st.sampled_from([None, None, 0, 1]),
    pp=st.sampled_from([None, None, None, 2]),
    tp=st.sampled_from([None, None, None, 1, 2]),
    recompute=st.sampled_from([None, None, *RECOMPUTES]),
    sp=st.sampled_from([None, None, None, 1, 2]),
    ep=st.sampled_from([None, None, 1, 2]),
    offload=st.sampled_from([None, None, None, "none", "cpu"]),
    drive=st.booleans(),
)
machines = st.builds(
    lambda log_memory, per_node, error, firm, host: Figures(
        cluster_of(int(2**log_memory), per_node).model_copy(update={"time_error": error, "host_memory_bytes": host}),
        known=True,
        firm=firm,
    ),
    st.floats(20, 36),
    st.integers(1, 4),
    st.sampled_from([0.15, 1.0]),
    st.booleans(),
    st.sampled_from([0, 10**10, 10**13]),
)


@st.composite
def jobs(draw: st.DrawFn) -> tuple[Job, Asked]:
    shape, asked, dtype = draw(shapes(8)), draw(wishes), draw(dtypes)
    job = Job(shape, dtype, asked.global_batch)
    assume(job.runs(Candidate.of(asked.layout(asked.replica_size * (asked.ep or 1)))))
    return job, asked


def plans_of(job: Job, figures: Figures, asked: Asked) -> Plans:
    try:
        return planned(job, figures, asked, 1, HIGH)
    except NothingFits:
        assert figures.firm
        return ()


@settings(deadline=None, max_examples=60)
@given(jobs(), machines)
def test_every_plan_has_what_was_asked_for_and_what_an_engine_runs(work: tuple[Job, Asked], figures: Figures) -> None:
    job, asked = work
    plans = plans_of(job, figures, asked)
    assert plans == plans_of(job, figures, asked), "a plan is a function"
    for plan in plans:
        assert plan.keys() == plans[0].keys(), "memory never makes a world size illegal"
        for size, choice in plan.items():
            layout = choice.layout
            assert (layout.world_size, layout.global_batch) == (size, asked.global_batch)
            assert layout.micro_batch <= asked.micro_batch
            assert job.runs(Candidate.of(layout))
            for name in ("zero_stage", "pp", "tp", "sp", "ep", "offload", "recompute"):
                assert getattr(asked, name) in (None, getattr(layout, name))


@settings(deadline=None, max_examples=60)
@given(jobs(), machines)
def test_what_is_chosen_fits_and_what_was_asked_for_is_kept_where_nothing_is_known_to_be_faster(
    work: tuple[Job, Asked], figures: Figures
) -> None:
    job, asked = work
    plans = plans_of(job, figures, asked)
    assume(plans)
    for size, choice in plans[0].items():
        assert choice.memory is not None
        room = figures.cluster.device.memory_bytes
        assert choice.memory.device_bytes <= room or not figures.firm
        if size in asked.world_sizes(1, HIGH) and choice.memory.device_bytes <= room:
            usual = weigh(job, Candidate.of(asked.layout(size)), figures.cluster)
            chosen = weigh(job, Candidate.of(choice.layout), figures.cluster)
            kept = choice.layout == asked.layout(size)
            known_to_be_faster = not usual.as_fast_as(chosen, figures.cluster.time_error)
            assert kept or usual.memory.device_bytes > room or known_to_be_faster


@settings(deadline=None, max_examples=60)
@given(jobs(), machines)
def test_nobody_is_given_offload_that_did_not_ask_for_it_but_where_nothing_else_fits(
    work: tuple[Job, Asked], figures: Figures
) -> None:
    job, asked = work
    cluster = figures.cluster
    assume(asked.offload is None)
    without = plans_of(job, replace(figures, firm=True), replace(asked, offload="none"))
    for size, choice in (plans_of(job, figures, asked) or ({},))[0].items():
        offload = choice.layout.offload
        if (
            offload != "none"
            and choice.memory is not None
            and choice.memory.device_bytes <= cluster.device.memory_bytes
        ):
            assert not without or size not in without[0]
            assert fits(job, Candidate.of(choice.layout), choice.memory, cluster), "the host has room too"
        assert offload != "cpu" or not cluster.one_memory
        assert offload != "nvme" or asked.drive


@settings(deadline=None, max_examples=60)
@given(jobs(), machines, st.integers(1, HIGH))
def test_each_lack_of_memory_leads_to_less_until_there_is_nothing_leaner(
    work: tuple[Job, Asked], figures: Figures, size: int
) -> None:
    plans = plans_of(*work[:1], figures, work[1])
    assume(plans and size in plans[0])
    needs, rung = [], 0
    while rung is not None:
        choice = plans[rung][size]
        assert choice.memory is not None
        needs.append(choice.memory.tensor_bytes)
        assert plans[rung_of(plans, choice.layout)][size].layout == choice.layout
        rung = relief(plans, rung, size)
    assert all(after < before for before, after in pairwise(needs))
    assert needs[-1] == plans[-1][size].memory.tensor_bytes or len(plans) == 1  # type: ignore[union-attr]  # as above
    assert len(plans) < 60


SMALL = Job(ModelShape(2, 160, 4, 2, 448, 2048, 128), "fp32", 16)
ROOMY = figures_of([{"CPU": 2, "memory": 4e9}] * 2, {"CPU": 1}, None, 8)


@pytest.mark.parametrize("figures", [ROOMY, replace(ROOMY, known=False)])
def test_a_small_model_with_room_trains_as_ever(figures: Figures) -> None:
    asked = Asked(16, 4)
    plans = planned(SMALL, figures, asked, 1, 4)
    assert {n: c.layout for n, c in plans[0].items()} == {
        1: Layout(1, 1, 4, 4),
        2: Layout(2, 1, 4, 2),
        4: Layout(4, 1, 4, 1),
    }
    assert relief(plans, 0, 2) is not None
    assert plans[relief(plans, 0, 2) or 0][2].layout == Layout(2, 1, 2, 4), "the micro-batch is halved first"


def test_a_step_of_thousands_of_micro_batches_is_as_legal_as_ever() -> None:
    plans = planned(replace(SMALL, global_batch=10_000), ROOMY, Asked(10_000, 1), 1, 1)
    assert plans[0][1].layout == Layout(1, 1, 1, 10_000)


def test_worlds_that_the_batch_can_not_share_are_split_otherwise_where_that_is_all_there_is() -> None:
    """Four micro-batches and three workers: a pipeline of three stages, if two can't hold the model."""
    job, asked = Job(ModelShape(4, 32, 2, 2, 96, 512, 32, dropout=True), "fp32", 8), Asked(8, 2)
    layout = Layout(1, 0, 2, 4, pp=3, recompute="full")
    needs = weigh(job, Candidate.of(layout), ROOMY.cluster).memory.device_bytes
    tight = figures_of([{"CPU": 1}] * 4, {"CPU": 1}, needs, 8)
    plan = planned(job, tight, asked, 2, 4)[0]
    assert list(plan) == [3, 4]
    assert plan[3].layout == layout
    assert list(planned(job, ROOMY, asked, 2, 4)[0]) == [2, 4], "a spare is as good, as far as can be told"


def test_a_model_too_large_is_refused_where_the_memory_is_sure() -> None:
    given = figures_of([{"CPU": 1}] * 2, {"CPU": 1}, 351_000_000, 8)
    with pytest.raises(NothingFits, match=r"no layout of 2 workers fits .* with 0.351 GB: the leanest, dp"):
        planned(SMALL, given, Asked(16, 4), 1, 2)
    found = figures_of([{"CPU": 1, "memory": 351e6}] * 2, {"CPU": 1}, None, 8)
    plans = planned(SMALL, found, Asked(16, 4), 1, 2)
    assert plans[0][2].layout == plans[-1][2].layout
    assert "predicted" in plans[0][2].why


def test_what_can_not_be_weighed_has_smaller_micro_batches_only() -> None:
    plans = as_asked(Asked(16, 4, zero_stage=2), 1, 2, "parallel.layout is manual")
    assert [plan[2].layout for plan in plans] == [Layout(2, 2, 4, 2), Layout(2, 2, 2, 4), Layout(2, 2, 1, 8)]
    assert [relief(plans, rung, 2) for rung in range(3)] == [1, 2, None]
    assert rung_of(plans, Layout(1, 2, 2, 8)) == 1
    assert rung_of(plans, Layout(1, 3, 4, 4)) == 0, "another plan: its micro-batch is all that counts"
    assert rung_of(plans, Layout(8, 2, 1, 2)) == 2


def test_a_node_is_shared_by_the_workers_that_it_may_get_and_no_more() -> None:
    nodes = [{"CPU": 64.0, "memory": 64e9}, {"CPU": 2.0, "memory": 10e9}, {"memory": 1e9}]
    shares = [figures_of(nodes, {"CPU": 1}, None, most).cluster.device.memory_bytes for most in (1, 3, 100)]
    assert shares == [10 * 10**9, 5 * 10**9, 10**9]
    assert not figures_of([], {"CPU": 1}, None, 2).known


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gpus_are_known_by_their_type(dtype: Dtype) -> None:
    node = {"CPU": 32.0, "GPU": 8.0, "memory": 5e11, "accelerator_type:H100": 1.0}
    demand = {"CPU": 1.0, "GPU": 1.0}
    figures = figures_of([node, node, {"CPU": 4.0}], demand, None, 8)
    assert (figures.cluster.num_nodes, figures.cluster.devices_per_node) == (2, 8)
    assert (figures.known, figures.firm, figures.cluster.device.memory_bytes) == (True, True, 80 * 2**30)
    given = figures_of([node], demand, 40 * 10**9, 8)
    assert given.cluster.device.memory_bytes == 40 * 10**9
    assert gpu_named("NVIDIA A100-SXM4-80GB") == gpu_named("A100-80G") != gpu_named("NVIDIA A100-SXM4-40GB")
    strange = figures_of([{"CPU": 8.0, "GPU": 1.0, "accelerator_type:X9000": 1.0}], demand, None, 8)
    assert not strange.known
    large = Job(ModelShape(32, 4096, 32, 8, 11_008, 32_000, 4096, tie_embeddings=False), dtype, 64)
    assert planned(large, strange, Asked(64, 1), 8, 8)[0][8].layout == Layout(8, 1, 1, 8)
    assert planned(large, figures, Asked(64, 1), 8, 8)[0][8].layout != Layout(8, 1, 1, 8)
