"""A mixture of experts whose experts two nodes share: a worker is killed, and the losses are the same bit for bit.

And one whose experts are shared only while workers are missing, because `parallel.layout: auto` finds that they must
be. About 60 s on two cores.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from product import TINY, Product, Report, assert_near, assert_recorded, assert_same_training, mlflow_run

from elastictrain.config import TrainConfig
from elastictrain.plan.figures import figures_of
from elastictrain.plan.layout import Layout
from elastictrain.plan.memory import memory_of
from elastictrain.plan.space import Candidate
from elastictrain.planning import job_of

MODEL = {**TINY["model"], "num_experts": 4, "intermediate_size": 256}
EXPERTS = ("model.num_experts=4", "model.intermediate_size=256")
SHARED = ("parallel={layout: manual, ep: 2}", "elastic.min_workers=1", "train.steps=24")
KILL = {"at": 12, "rank": 1, "kind": "kill", "phase": "backward"}
TOGETHER = Candidate(2, 2, 2, ep=2)


@pytest.fixture(scope="module")
def whole(shared_cluster: Any, storage_folder: Path) -> Report:
    """The report of a run to which nothing happens."""
    product = Product(storage_folder, shared_cluster.address)
    try:
        ended = product.train("whole", *EXPERTS, *SHARED)
        assert ended.code == 0, ended.err
        return product.report("whole")
    finally:
        product.close()


def test_a_worker_that_holds_experts_is_killed(product: Product, whole: Report) -> None:
    ended = product.train("shared", *EXPERTS, *SHARED, f"faults={json.dumps([KILL])}")
    assert ended.code == 0, ended.err
    report = product.report("shared")
    assert report["status"] == whole["status"] == "complete"
    assert_same_training(report, whole)
    [failure] = report["failures"]
    assert failure["continuation"] == "bit_exact"
    assert failure["lost_steps"] <= 1
    for generation in report["generations"]:
        assert generation["layout"] == {
            "dp": 2, "ep": 2, "zero_stage": 1, "micro_batch": 2, "accumulation": 2
        }  # fmt: skip
        assert len({member["node"] for member in generation["members"]}) == 2

    run_id = assert_recorded(product.storage, report)
    client, _ = mlflow_run(product.storage, "shared")
    busiest = client.get_metric_history(run_id, "model/busiest_expert")
    dropped = client.get_metric_history(run_id, "model/dropped_tokens")
    assert {m.step for m in busiest} == {m.step for m in dropped} == set(range(1, 25))
    assert all(1 <= m.value <= 2 for m in busiest), "of four experts two of which each token goes to"
    assert all(0 <= m.value < 0.5 for m in dropped)


def test_a_worker_of_a_pipeline_whose_stages_share_experts_is_killed(product: Product, whole: Report) -> None:
    """Four workers, two stages, half of the experts on each: every worker has what no other has."""
    split = ("parallel={layout: manual, pp: 2, ep: 2}", "elastic={min_workers: 4, max_workers: 4}", "train.steps=24")
    ended = product.train("stages", *EXPERTS, *split, f"faults={json.dumps([KILL])}")
    assert ended.code == 0, ended.err
    report = product.report("stages")
    assert report["status"] == "complete"
    assert_near(report, whole)
    [failure] = report["failures"]
    assert failure["continuation"] == "bit_exact"
    assert failure["lost_steps"] <= 1
    assert {generation["layout"]["pp"] * generation["layout"]["ep"] for generation in report["generations"]} == {4}
    for name in ("busiest_expert", "dropped_tokens"):
        [told, plain] = [[value for _, value in found["gauges"][name]] for found in (report, whole)]
        assert told == pytest.approx(plain, abs=1e-3)


def just_enough() -> int:
    """Bytes with which two workers can train if they share the experts, and four if they don't."""
    shape = job_of(TrainConfig.from_dict({**TINY, "model": MODEL})).shape
    return memory_of(shape, "fp32", TOGETHER, figures_of([], {"CPU": 1}, None, 8).cluster.device).device_bytes


def test_experts_are_shared_out_while_workers_are_missing(product: Product, whole: Report) -> None:
    """Of four workers one is killed: two go on, each with half of the experts."""
    little = (f"cluster.device_memory={just_enough()}", "train.activation_checkpointing=false")
    little = (*little, "parallel={zero_stage: 1, pp: 1, tp: 1}")
    four_or_two = ("elastic.max_workers=4", "elastic.replace_timeout_s=0.1")
    running = product.begin("missing", *EXPERTS, *little, *four_or_two, "train.steps=100000")
    status = running.until("four", lambda: (s := running.status()) and len(s.workers) == 4 and s.step >= 20 and s)
    os.kill(status.workers[1].pid, signal.SIGKILL)
    running.until_running(generation=status.generation + 1, step=status.step + 5)
    ended = running.stop()
    assert ended.code == 130, ended.err
    report = product.report("missing")
    assert_near(report, whole)
    [failure] = report["failures"]
    assert failure["continuation"] == "order_exact"
    assert failure["lost_steps"] <= 1
    layouts = {4: Layout(4, 1, 2, 1).to_json(), 2: TOGETHER.layout().to_json()}
    sizes = [generation["world_size"] for generation in report["generations"]]
    assert [generation["layout"] for generation in report["generations"]] == [layouts[size] for size in sizes]
    assert sizes[status.generation : status.generation + 2] == [4, 2]
    assert any("dp2 zero1 2x2 would need" in chosen["why"] for chosen in report["layouts"])
