"""The cluster's head node is lost, and with it the cluster: the last state gets to storage, another cluster goes on.

Without its head a Ray cluster can start and place nothing any more, so the run ends, and says how it goes on. About
60 s on two cores, most of it until Ray's other node knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
from product import Product, Report, assert_near, kill

STEPS = 3000


def test_the_head_node_is_lost_and_another_cluster_goes_on(
    small_cluster: Any, shared_cluster: Any, storage_folder: Path, undisturbed: Report
) -> None:
    steps = f"train.steps={STEPS}"
    product = Product(storage_folder, str(small_cluster.address))
    try:
        running = product.begin("headless", steps, "checkpoint.every=100000")
        before = running.until_running(generation=0, step=30)
        assert {worker.node for worker in before.workers} == {"127.0.0.31", "127.0.0.32"}
        head = [p.process.pid for kind in small_cluster.head_node.all_processes.values() for p in kind]
        kill([process for pid in head for process in [psutil.Process(pid), *psutil.Process(pid).children(True)]])
        ended = running.end()
        assert ended.code == 5, ended.err
        assert "The run goes on when it is submitted again, to a cluster that is there." in ended.err
        lost = product.report("headless")
        code, [checkpoint] = product.checkpoints("headless", "--verify")
        assert (code, checkpoint["step"], checkpoint["verified"]) == (0, lost["steps"], True)
        assert 30 <= lost["steps"] < STEPS
    finally:
        product.close()

    elsewhere = Product(storage_folder, shared_cluster.address)
    try:
        running = elsewhere.begin("headless", steps)
        running.until_step(lost["steps"] + 20)
        assert running.stop().code == 130
        report = elsewhere.report("headless")
    finally:
        elsewhere.close()
    assert_near(report, undisturbed)
    assert report["lost_steps"] == 0
    resumed = report["generations"][-1]
    assert (resumed["cause"], resumed["source"]) == ("resume", "durable")
    assert resumed["first_step"] == lost["steps"] + 1
