"""`parallel.layout: auto` with little memory: another layout than the usual one, and another again when a node is lost.

The memory is a figure (`cluster.device_memory`), everything else is real. The samples stay the same, and the losses
but for the order of float sums. About 30 s on two cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
from product import TINY, Product, Report, assert_near, kill

from elastictrain.config import TrainConfig
from elastictrain.plan.figures import figures_of
from elastictrain.plan.memory import memory_of
from elastictrain.plan.space import Candidate
from elastictrain.planning import job_of

PIPELINE = Candidate(1, 2, 4, 0, pp=2, activation_checkpointing="full")


def just_enough() -> int:
    """Bytes with which two workers can train as a pipeline, and in no other way with this micro-batch."""
    config = TrainConfig.from_dict(TINY)
    device = figures_of([], {"CPU": 1}, None, 8).cluster.device
    return memory_of(job_of(config).shape, "fp32", PIPELINE, device).device_bytes


def test_a_lost_node_changes_the_layout_and_nothing_else(
    small_cluster: Any, storage_folder: Path, undisturbed: Report
) -> None:
    """Data parallelism on four nodes, of which one is lost: two of the three workers left go on as a pipeline."""
    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    small_cluster.add_node(**node, node_ip_address="127.0.0.33")
    doomed = small_cluster.add_node(**node, node_ip_address="127.0.0.34")
    product = Product(storage_folder, str(small_cluster.address))
    little = [f"cluster.device_memory={just_enough()}", "train.activation_checkpointing=true", "elastic.max_workers=4"]
    try:
        running = product.begin("replanned", *little, "train.steps=100000")
        running.until_step(20)
        raylet = psutil.Process(doomed.all_processes["raylet"][0].process.pid)
        kill([raylet, *raylet.children(recursive=True)])
        status = running.until_running(generation=1)
        running.until_step(status.step + 20)
        ended = running.stop()
        assert ended.code == 130, ended.err
        report = product.report("replanned")
    finally:
        product.close()
    assert_near(report, undisturbed)
    [failure] = report["failures"]
    assert (failure["kind"], failure["continuation"]) == ("node_lost", "order_exact")
    assert failure["lost_steps"] <= 1
    four, two = report["generations"]
    common = {"micro_batch": 2, "recompute": "full"}
    assert four["layout"] == {"dp": 4, "zero_stage": 1, "accumulation": 1, **common}
    assert two["layout"] == {"dp": 1, "pp": 2, "zero_stage": 0, "accumulation": 4, **common}
    assert [entry["layout"] for entry in report["layouts"]] == [four["layout"], two["layout"]]
    assert "dp2 zero1 2x2 recompute would need" in report["layouts"][1]["why"]
    assert report["layouts"][1]["memory_bytes"] == just_enough()
    assert f"layout {PIPELINE.layout()}: dp2 zero1 2x2 recompute would need" in ended.out
