"""A model split into two stages: a node is lost, the run goes on with one replica, and then with another layout.

The samples stay the same, and the losses but for the order of float sums. A worker that shares sequences dies too,
and the losses stay the same bit for bit. About 90 s on two cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
from product import Product, Report, assert_near, assert_same_training, kill

PIPELINE = ("parallel.layout=manual", "parallel.pp=2", "elastic.max_workers=4")
TENSOR = ("parallel.layout=manual", "parallel.tp=2")


def test_a_lost_worker_costs_a_replica_and_another_layout_goes_on(
    small_cluster: Any, storage_folder: Path, undisturbed: Report
) -> None:
    """pp2 x dp2 on four nodes, pp2 x dp1 on three, one of them spare, then tp2, from storage, where one is killed."""
    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    small_cluster.add_node(**node, node_ip_address="127.0.0.33")
    doomed = small_cluster.add_node(**node, node_ip_address="127.0.0.34")
    product = Product(storage_folder, str(small_cluster.address))
    try:
        running = product.begin("pipeline", *PIPELINE, "train.steps=100000")
        running.until_step(20)
        raylet = psutil.Process(doomed.all_processes["raylet"][0].process.pid)
        kill([raylet, *raylet.children(recursive=True)])
        status = running.until_running(generation=1)
        assert (status.world_size, status.layout) == (2, "dp1 pp2 zero1")
        ended = running.stop()
        assert ended.code == 130, ended.err
        steps = product.report("pipeline")["steps"]
        fault = f"faults=[{{at: {steps + 10}, rank: 1, kind: kill, phase: backward}}]"
        ended = product.train("pipeline", *TENSOR, f"train.steps={steps + 20}", fault)
        assert ended.code == 0, ended.err
        report = product.report("pipeline")
    finally:
        product.close()
    assert report["status"] == "complete"
    assert_near(report, undisturbed)
    lost, killed = report["failures"]
    assert (lost["kind"], killed["kind"], killed["cause"]["message"]) == ("node_lost", "worker_lost", "SIGKILL")
    assert (lost["source"], killed["source"]) == ("memory", "memory")
    assert max(lost["lost_steps"], killed["lost_steps"]) <= 1
    four, two, tensor, again = report["generations"]
    assert four["layout"] == {"dp": 2, "pp": 2, "zero_stage": 1, "micro_batch": 2, "accumulation": 2}
    assert two["layout"] == {"dp": 1, "pp": 2, "zero_stage": 1, "micro_batch": 2, "accumulation": 4}
    assert tensor["layout"] == {"dp": 1, "tp": 2, "zero_stage": 1, "micro_batch": 2, "accumulation": 4}
    assert again["layout"] == tensor["layout"]
    assert [g["source"] for g in (four, two, tensor, again)] == ["fresh", "memory", "durable", "memory"]
    assert [g["continuation"] for g in (two, tensor, again)] == ["order_exact", "order_exact", "bit_exact"]


SEQUENCES = ("parallel.layout=manual", "parallel.sp=2", "parallel.zero_stage=2", "train.steps=30")


def test_workers_that_share_sequences_go_on_bit_for_bit(product: Product) -> None:
    """One is killed by plan in the middle of an exchange; the same losses as without, dropout and all."""
    reports = []
    for name, faults in (
        ("sequences", "[]"),
        ("sequences-killed", "[{at: 12, rank: 1, kind: kill, phase: backward}]"),
    ):
        ended = product.train(name, *SEQUENCES, f"faults={faults}")
        assert ended.code == 0, ended.err
        reports.append(product.report(name))
    calm, killed = reports
    assert_same_training(killed, calm)
    [failure] = killed["failures"]
    assert (failure["cause"]["message"], failure["source"]) == ("SIGKILL", "memory")
    assert {g["continuation"] for g in killed["generations"]} == {"bit_exact"}
    [layout, again] = [g["layout"] for g in killed["generations"]]
    assert layout == again == {"dp": 1, "sp": 2, "zero_stage": 2, "micro_batch": 2, "accumulation": 4}
