"""The planner over random models, machines and batches: every layout legal, memory and ranking as they must be."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from elastictrain.config import TrainConfig
from elastictrain.errors import ConfigError
from elastictrain.plan.calibrate import Measured, calibrate
from elastictrain.plan.choose import Job, NothingFits, fits, rank_layouts, world_sizes
from elastictrain.plan.cluster import Cluster, Device, Dtype, Efficiency, Link
from elastictrain.plan.collectives import all_gather_s, all_reduce_s
from elastictrain.plan.memory import memory_of
from elastictrain.plan.model_shape import ModelShape
from elastictrain.plan.space import OFFLOADS, RECOMPUTES, Candidate, divisors, enumerate_layouts, everything
from elastictrain.plan.step_time import step_time

LINK = Link(bytes_per_s=1e10, latency_s=1e-5)


def cluster_of(memory_bytes: int, devices_per_node: int = 4, num_nodes: int = 2) -> Cluster:
    device = Device(
        name="device", memory_bytes=memory_bytes, flops={"fp32": 1e13, "bf16": 1e14}, memory_bytes_per_s=1e12
    )
    return Cluster(
        name="cluster", num_nodes=num_nodes, devices_per_node=devices_per_node, device=device,
        within_node=Link(bytes_per_s=1e11, latency_s=1e-6), between_nodes=LINK, host_link=LINK,
        host_memory_bytes=10**12, host_memory_bytes_per_s=1e11, nvme_bytes_per_s=1e9,
    )  # fmt: skip


LARGE = cluster_of(10**15)


@st.composite
def shapes(draw: st.DrawFn, largest_width: int = 32) -> ModelShape:
    heads = draw(st.sampled_from([2, 4, 8]))
    return ModelShape(
        num_layers=draw(st.integers(1, 12)),
        hidden_size=heads * 16 * draw(st.integers(1, largest_width)),
        num_heads=heads,
        num_kv_heads=draw(st.sampled_from(divisors(heads))),
        intermediate_size=32 * draw(st.integers(1, 40)),
        vocab_size=draw(st.integers(257, 50_000)),
        seq_len=16 * draw(st.integers(1, 32)),
        tie_embeddings=draw(st.booleans()),
        dropout=draw(st.booleans()),
        num_experts=draw(st.sampled_from([1, 1, 4])),
    )


dtypes = st.sampled_from(["fp32", "bf16"])
worlds = st.sampled_from([1, 2, 3, 4, 6, 8])
batches = st.sampled_from([8, 24, 48])


@settings(deadline=None, max_examples=40)
@given(shapes(), worlds, batches)
def test_every_layout_is_whole_and_listed_once(shape: ModelShape, world: int, batch: int) -> None:
    candidates = list(enumerate_layouts(shape, world, batch, everything(shape, world, 4, nvme=True)))
    assert len(set(candidates)) == len(candidates)
    for c in candidates:
        assert c.dp * c.pp * c.tp * c.sp == c.world_size == world
        assert c.micro_batch * c.accumulation * c.dp == c.global_batch == batch
        assert shape.num_experts % c.ep == (c.dp * c.sp) % c.ep == 0
        assert c.zero_stage < 2 or c.pp == 1
        assert c.zero_stage < 3 or c.ep == 1
    assert set(enumerate_layouts(shape, world, batch)) == {
        c for c in candidates if c.pp == c.tp == c.sp == c.ep == 1 and c.offload == "none"
    }
    for layout in (c.layout() for c in candidates):
        assert (layout.world_size, layout.global_batch) == (world, batch)


@given(dtypes, st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.sampled_from([1, 2, 4]))
def test_the_planner_proposes_what_the_config_takes_and_nothing_else(
    dtype: Dtype, pp: int, tp: int, stage: int, kv_heads: int
) -> None:
    job = Job(ModelShape(3, 128, 4, kv_heads, 256, 512, 16), dtype, 4)
    data = {
        "train": {"dtype": dtype, "global_batch": 4, "micro_batch": 1},
        "model": {"num_layers": 3, "num_heads": 4, "num_kv_heads": kv_heads},
        "parallel": {"layout": "manual", "pp": pp, "tp": tp, "zero_stage": stage},
        "elastic": {"max_workers": pp * tp},
    }
    try:
        TrainConfig.from_dict(data)
    except ConfigError:
        taken = False
    else:
        taken = True
    assert job.runs(Candidate(1, 1, 4, stage, pp=pp, tp=tp)) == taken


def test_no_model_that_can_not_be_split_is() -> None:
    shape = ModelShape(4, 128, 4, 4, 256, 512, 16)
    for splits in (True, False):
        ranking = rank_layouts(Job(shape, "fp32", 8, splits), LARGE, 4)
        assert any(o.candidate.pp * o.candidate.tp > 1 for o in ranking.options) == splits


@settings(deadline=None, max_examples=40)
@given(shapes(), dtypes, worlds, batches)
def test_parts_add_up_and_more_ranks_never_need_more(shape: ModelShape, dtype: Dtype, world: int, batch: int) -> None:
    for c in enumerate_layouts(shape, world, batch, everything(shape, world, 4)):
        memory = memory_of(shape, dtype, c, LARGE.device)
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.buffers)
        assert sum(parts) == memory.tensor_bytes <= memory.device_bytes
        assert min(parts) >= 0 < memory.weights + memory.host_bytes
        # Beside other ranks, stage 3 gathers whole weights; one rank alone needs no copies of its own.
        if c.zero_stage in (1, 2) or (c.zero_stage == 3 and c.zero_group > 1):
            wider = memory_of(shape, dtype, replace(c, dp=2 * c.dp), LARGE.device)
            # an uneven share is padded by less than an element a rank
            assert wider.device_bytes <= memory.device_bytes + 100


@settings(deadline=None, max_examples=40)
@given(shapes(), dtypes, batches)
def test_a_higher_stage_holds_less_of_the_state(shape: ModelShape, dtype: Dtype, batch: int) -> None:
    # Buckets, and weights gathered for a moment, do not depend on the model's size: they count in small models only.
    large = replace(shape, num_layers=400, hidden_size=16_384, num_heads=64, num_kv_heads=8, num_experts=1)
    held = []
    for stage in range(4):
        memory = memory_of(large, dtype, Candidate(batch, 1, 2, stage, activation_checkpointing="full"), LARGE.device)
        held.append(memory.weights + memory.gradients + memory.optimizer)
    assert held == sorted(held, reverse=True)
    assert held[3] < held[0] / 3


@settings(deadline=None, max_examples=40)
@given(shapes(), dtypes, batches)
def test_recomputing_and_smaller_micro_batches_save_memory(shape: ModelShape, dtype: Dtype, batch: int) -> None:
    deep = replace(shape, num_layers=shape.num_layers + 4)
    for c in enumerate_layouts(deep, 2, batch):
        memory = memory_of(deep, dtype, c, LARGE.device)
        if c.activation_checkpointing == "none":
            more = [replace(c, activation_checkpointing=again) for again in RECOMPUTES]
            needs = [memory_of(deep, dtype, again, LARGE.device).device_bytes for again in more]
            assert max(needs) == memory.device_bytes  # in few layers, all of one again may be more than all cheap ones
            takes = [step_time(deep, dtype, again, LARGE).step_s for again in more]
            assert takes == sorted(takes)
            assert takes[0] < takes[-1]
        if c.micro_batch % 2 == 0 and c.accumulation > 1:
            half = replace(c, micro_batch=c.micro_batch // 2, accumulation=2 * c.accumulation)
            assert memory_of(deep, dtype, half, LARGE.device).device_bytes <= memory.device_bytes


@settings(deadline=None, max_examples=40)
@given(shapes(), dtypes, worlds, batches, st.integers(20, 40))
def test_the_best_is_never_beaten(shape: ModelShape, dtype: Dtype, world: int, batch: int, log_memory: int) -> None:
    assume(batch % world == 0)
    job, cluster = Job(shape, dtype, batch), cluster_of(2**log_memory)
    choices = everything(shape, world, 4)
    candidates = enumerate_layouts(shape, world, batch, choices)
    if not any(fits(job, c, memory_of(shape, dtype, c, cluster.device), cluster) for c in candidates):
        with pytest.raises(NothingFits, match=r"the leanest, dp.* needs .* GB a worker"):
            rank_layouts(job, cluster, world, choices)
        return
    ranking = rank_layouts(job, cluster, world, choices)
    assert all(option.fits(job, cluster) for option in ranking.options)
    times = [option.time.step_s for option in ranking.options]
    assert times == sorted(times)
    for kind in ranking.best_of_each_kind():
        assert ranking.best.time.step_s <= kind.time.step_s
    assert all(0 < option.utilisation(job, cluster) <= cluster.efficiency.matmul for option in ranking.options[:3])


@settings(deadline=None, max_examples=40)
@given(shapes(), dtypes, batches, st.integers(1, 8))
def test_world_sizes_are_those_with_a_whole_step(shape: ModelShape, dtype: Dtype, batch: int, high: int) -> None:
    legal = [n for n in range(1, high + 1) if batch % n == 0]
    sizes = world_sizes(Job(shape, dtype, batch), LARGE, legal)
    assert list(sizes) == legal
    assert all(option and option.candidate.world_size == n for n, option in sizes.items())


@given(st.floats(0, 1e12), st.integers(1, 1000))
def test_a_ring_moves_what_it_must(num_bytes: float, ranks: int) -> None:
    assert all_reduce_s(num_bytes, 1, LINK) == 0
    assert all_reduce_s(num_bytes, ranks, LINK) == 2 * all_gather_s(num_bytes, ranks, LINK)
    assert all_gather_s(num_bytes, ranks, LINK) <= num_bytes / LINK.bytes_per_s + ranks * LINK.latency_s


def test_a_batch_that_no_rank_can_share_is_told_apart_from_a_lack_of_memory() -> None:
    shape = ModelShape(1, 32, 2, 2, 32, 300, 16)
    with pytest.raises(ConfigError, match=r"5 workers can't share a step of train\.global_batch 8") as caught:
        rank_layouts(Job(shape, "fp32", 8), LARGE, 5)
    assert not isinstance(caught.value, NothingFits)


shares = st.floats(0.1, 1.0)


@settings(deadline=None, max_examples=10)
@given(shares, shares, shares, st.floats(1e-4, 1e-2), st.floats(1e-4, 1e-2), st.floats(1e-5, 1e-3))
def test_a_profile_tells_the_shares_that_made_it(
    matmul: float, memory: float, network: float, micro_batch_s: float, step_s: float, layer_s: float
) -> None:
    true = Efficiency(
        matmul=matmul, memory=memory, network=network,
        micro_batch_s=micro_batch_s, step_s=step_s, gathered_layer_s=layer_s,
    )  # fmt: skip
    really = LARGE.model_copy(update={"efficiency": true})
    shape = ModelShape(8, 512, 8, 8, 1408, 8192, 256)
    candidates = list(enumerate_layouts(shape, 4, 16)) + list(enumerate_layouts(shape, 1, 16))
    measured = [Measured(c, step_time(shape, "fp32", c, really).step_s) for c in candidates[::3]]
    found = LARGE.model_copy(update={"efficiency": calibrate(shape, "fp32", LARGE, measured)})
    for c in candidates:
        told, real = (step_time(shape, "fp32", c, cluster).step_s for cluster in (found, really))
        assert told == pytest.approx(real, rel=0.03)


def test_a_pipeline_idles_for_its_stages_less_one() -> None:
    shape = ModelShape(8, 512, 8, 8, 1408, 8192, 256)
    of_one = step_time(shape, "bf16", Candidate(1, 1, 16, pp=4), LARGE)
    busy = of_one.compute + of_one.pipeline
    assert of_one.bubble == pytest.approx(busy * 3 / 16)
    assert step_time(shape, "bf16", Candidate(1, 1, 16, pp=4), LARGE, chunks=2).bubble == pytest.approx(busy * 3 / 32)


def test_accumulation_costs_stages_2_and_3_traffic() -> None:
    shape = ModelShape(8, 512, 8, 8, 1408, 8192, 256)
    for stage, times in ((0, 1), (1, 1), (2, 4), (3, 4)):
        once, often = (step_time(shape, "bf16", Candidate(4, 1, m, stage), LARGE) for m in (1, 4))
        assert often.gradients == pytest.approx(times * once.gradients)


def test_smaller_gradients_are_less_traffic_where_they_can_be_sent() -> None:
    shape = ModelShape(8, 512, 8, 8, 1408, 8192, 256)
    for stage in (1, 3):
        usual, half = (
            step_time(shape, "bf16", Candidate(4, 1, 2, stage, gradient_dtype=sent), LARGE) for sent in ("fp32", "bf16")
        )
        assert 0.5 <= half.gradients / usual.gradients < 0.6  # latency stays
        assert replace(half, gradients=usual.gradients) == usual
    job = Job(shape, "fp32", 8, gradient_dtype="int8")
    ranking = rank_layouts(job, LARGE, 4)
    assert {(o.candidate.zero_stage, o.candidate.gradient_dtype) for o in ranking.options} == {(3, "int8")}
    assert not job.runs(Candidate(4, 1, 2, 2, gradient_dtype="int8"))


@settings(deadline=None, max_examples=40)
@given(shapes(), dtypes)
def test_offloaded_state_lies_elsewhere(shape: ModelShape, dtype: Dtype) -> None:
    here, host, drive = (
        memory_of(shape, dtype, Candidate(4, 1, 2, 3, offload=offload), LARGE.device) for offload in OFFLOADS
    )
    assert here.host_bytes == here.nvme_bytes == host.nvme_bytes == 0
    assert host.host_bytes == drive.host_bytes + drive.nvme_bytes > drive.nvme_bytes == here.optimizer
    assert host.optimizer == drive.optimizer == 0
    assert host.device_bytes < here.device_bytes


def test_a_trillion_parameters_on_ten_thousand_devices_are_a_matter_of_seconds() -> None:
    shape = ModelShape(
        64, 8192, 64, 8, 24_576, 128_256, 4096, tie_embeddings=False, num_experts=64, experts_per_token=8
    )
    assert 1e12 < shape.num_parameters < 3e12
    cluster = cluster_of(80 * 10**9, devices_per_node=8, num_nodes=1280)
    ranking = rank_layouts(Job(shape, "bf16", 10_240), cluster, 10_240, everything(shape, 10_240, 8, nvme=True))
    # 35 us each: `rank_layouts` stays under 2 s of one core
    assert ranking.num_looked_at < 30_000
    best = ranking.best.candidate
    assert (best.world_size, best.global_batch) == (10_240, 10_240)
    assert best.ep > 1
