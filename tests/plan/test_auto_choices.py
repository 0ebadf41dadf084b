"""`parallel.layout: auto` where only one way of training fits: experts, sequences or offload, and what comes before."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastictrain.config import TrainConfig
from elastictrain.errors import ConfigError
from elastictrain.plan.auto import Asked, planned, relief
from elastictrain.plan.choose import Job, NothingFits, rank_layouts, weigh
from elastictrain.plan.figures import Figures, figures_of
from elastictrain.plan.layout import Layout
from elastictrain.plan.model_shape import ModelShape
from elastictrain.plan.space import RECOMPUTES, Candidate

GPU = {"CPU": 1.0, "GPU": 1.0}
LARGE = Job(ModelShape(32, 4096, 32, 8, 11_008, 32_000, 2048, tie_embeddings=False), "bf16", 16)
ASKED = Asked(16, 1)


def gpus(num: int, memory: float = 1e12, given: int | None = None) -> Figures:
    node = {"CPU": 32.0, "GPU": float(num), "memory": memory, "accelerator_type:A100": 1.0}
    return figures_of([node], GPU, given, num)


def cpus(given: float) -> Figures:
    return figures_of([{"CPU": 4.0, "memory": 64e9}], {"CPU": 1.0}, int(given), 4)


def chosen(job: Job, figures: Figures, asked: Asked, workers: int) -> Layout:
    return planned(job, figures, asked, workers, workers)[0][workers].layout


def test_offload_to_the_host_comes_where_nothing_else_fits() -> None:
    one, eight = chosen(LARGE, gpus(1), ASKED, 1), chosen(LARGE, gpus(8), ASKED, 8)
    assert one.offload == "cpu"
    assert one.zero_stage > 0
    assert eight.offload == "none"
    for size, layout in ((1, one), (8, eight)):
        assert rank_layouts(LARGE, gpus(8).cluster, size).best.candidate.offload == layout.offload
    with pytest.raises(NothingFits, match=r"the leanest, dp1 zero\d .*GB a worker\. Use more"):
        planned(LARGE, gpus(1), replace(ASKED, offload="none"), 1, 1)


def test_a_host_must_have_room_for_it_beside_the_snapshots() -> None:
    state = 12 * LARGE.shape.num_parameters
    with pytest.raises(NothingFits, match=r"a worker; offload needs hosts with more than 240 GB\. Use more"):
        planned(LARGE, gpus(1, 240e9), ASKED, 1, 1)
    assert chosen(LARGE, gpus(1, 5 * state), ASKED, 1).offload == "cpu"


def test_a_drive_is_the_last_resort_of_those_who_named_a_folder() -> None:
    nearly = replace(ASKED, drive=True)
    assert chosen(LARGE, gpus(1), nearly, 1).offload == "cpu"
    state = weigh(LARGE, Candidate(1, 1, 16, 3, offload="nvme"), gpus(1).cluster).memory.nvme_bytes
    host = 3 * state
    assert chosen(LARGE, gpus(1, host), nearly, 1).offload == "nvme"
    with pytest.raises(NothingFits):
        planned(LARGE, gpus(1, host), ASKED, 1, 1)


def test_lacks_of_memory_lead_to_offload_at_last() -> None:
    plans = planned(LARGE, gpus(8), ASKED, 8, 8)
    ways, rung = list[str](), 0
    while rung is not None:
        ways.append(plans[rung][8].layout.offload)
        rung = relief(plans, rung, 8)
    assert ways == sorted(ways, reverse=True)
    assert {ways[0], ways[-1]} == {"none", "cpu"}


def test_on_cpus_offload_makes_no_room() -> None:
    small = Job(ModelShape(4, 256, 4, 4, 704, 2048, 128), "fp32", 8)
    figures = cpus(64e9)
    for stage in (1, 2, 3):
        kept, away = (
            weigh(small, Candidate(1, 1, 8, stage, offload=offload), figures.cluster).memory
            for offload in ("none", "cpu")
        )
        assert away.host_bytes == 0
        assert away.device_bytes > 0.9 * kept.device_bytes
    leanest = planned(small, figures, Asked(8, 4), 1, 2)[-1]
    assert {choice.layout.offload for choice in leanest.values()} == {"none"}
    need = leanest[2].memory
    assert need is not None
    with pytest.raises(NothingFits):
        planned(small, cpus(need.device_bytes - 1), Asked(8, 4), 2, 2)
    asked = planned(small, figures, Asked(8, 4, offload="cpu"), 1, 2)[0]
    assert {choice.layout.offload for choice in asked.values()} == {"cpu"}, "what is asked for runs all the same"


def test_experts_are_shared_out_where_a_worker_can_not_hold_all() -> None:
    shape = ModelShape(2, 64, 4, 4, 1024, 512, 32, num_experts=8, experts_per_token=2)
    job, asked = Job(shape, "fp32", 8), Asked(8, 4, zero_stage=1, pp=1, tp=1)
    roomy = cpus(64e9)
    leanest = min(
        weigh(job, Candidate(4, 1, 2, 1, ep=4, activation_checkpointing=again), roomy.cluster).memory.device_bytes
        for again in RECOMPUTES
    )
    tight = cpus(leanest)
    assert chosen(job, tight, asked, 4).ep == 4
    assert chosen(job, roomy, asked, 2) == Layout(2, 1, 4, 1), "with room for all of them, as ever"
    with pytest.raises(NothingFits):
        planned(job, tight, replace(asked, ep=1), 4, 4)


def test_sequences_are_shared_where_they_are_too_long_for_one_worker() -> None:
    shape = ModelShape(1, 64, 4, 1, 192, 512, 8192)
    job, asked = Job(shape, "fp32", 4), Asked(4, 1)
    leanest = min(
        weigh(
            job, Candidate(1, 1, 4, stage, sp=4, activation_checkpointing=again), cpus(64e9).cluster
        ).memory.device_bytes
        for stage in range(4)
        for again in RECOMPUTES
    )
    layout = chosen(job, cpus(leanest), asked, 4)
    assert (layout.sp, layout.dp) == (4, 1)
    with pytest.raises(NothingFits):
        planned(job, cpus(leanest), replace(asked, sp=1), 4, 4)
    assert chosen(job, cpus(64e9), asked, 4) == Layout(4, 1, 1, 1)


def test_what_is_faster_by_more_than_the_error_is_chosen_too() -> None:
    """On GPUs whose speeds are known, experts that all workers hold cost more to average than tokens to exchange."""
    shape = replace(LARGE.shape, num_layers=8, num_experts=8, experts_per_token=2)
    job, cluster = replace(LARGE, shape=shape), gpus(8, given=10**12)
    plan = planned(job, cluster, ASKED, 8, 8)[0][8]
    assert plan.layout.ep > 1
    assert "slower" in plan.why
    assert job.runs(rank_layouts(job, cluster.cluster, 8).best.candidate)


@pytest.mark.parametrize("field", ["ep", "sp", "offload"])
def test_what_is_left_open_is_none_of_it_under_manual(field: str) -> None:
    config = TrainConfig.from_dict({"parallel": {"layout": "manual"}})
    assert getattr(config.parallel, field) is None
    assert config.layout(2) == Layout(2, 1, 4, 2)


def test_a_folder_on_a_drive_leaves_it_open_to_use_it() -> None:
    folder = {"offload_path": "/fast"}
    assert TrainConfig.from_dict({"parallel": folder}).parallel.offload is None
    with pytest.raises(ConfigError, match=r"offload_path /fast counts only with"):
        TrainConfig.from_dict({"parallel": {**folder, "layout": "manual"}})
