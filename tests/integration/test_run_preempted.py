"""Workers and nodes that are told to go leave at a step boundary: no step is lost, and nothing counts as a failure.

About 60 s on two cores.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from product import Product, Report, assert_near, assert_same_training

from elastictrain.status import Status


def assert_nothing_failed(report: Report) -> None:
    assert report["failures"] == []
    assert report["lost_steps"] == 0
    assert report["goodput"]["lost"] == report["goodput"]["recovery"] == 0
    # one node may be left; and nodes may be slow to come up on a busy machine
    assert {w["topic"] for w in report["warnings"]} <= {"preemption", "room", "copies", "waiting"}


def test_workers_get_sigterm(product: Product, undisturbed: Report) -> None:
    """One by plan, in the midst of a step; then rank 0, from outside. A standby takes each place."""
    plan = [{"at": 30, "rank": 1, "kind": "preempt", "phase": "backward"}]
    overrides = ("elastic.standby=1", "elastic.max_failures=0", "train.steps=100000", f"faults={json.dumps(plan)}")
    running = product.begin("preempted", *overrides)
    first = running.until_running(1)
    running.until("a standby", lambda: (s := running.status()) and s.standbys)
    leaver = first.workers[0].pid
    os.kill(leaver, signal.SIGTERM)
    second = running.until_running(2)
    running.until("the leaver's end", lambda: not psutil.pid_exists(leaver))
    assert second.workers[1].pid == first.workers[1].pid
    ended = running.stop()
    assert ended.code == 130, ended.err

    report = product.report("preempted")
    assert_same_training(report, undisturbed)
    assert_nothing_failed(report)
    assert [f["kind"] for f in report["faults_injected"]] == ["preempt"]
    before, after, last = report["generations"]
    assert [after["cause"], last["cause"]] == [
        f"{before['members'][1]['worker']} leaves: SIGTERM",
        f"{after['members'][0]['worker']} leaves: SIGTERM",
    ]
    assert after["first_step"] >= 31
    assert {g["continuation"] for g in report["generations"]} == {"bit_exact"}
    assert {g["source"] for g in (after, last)} == {"memory"}
    assert after["members"][0] == before["members"][0]
    assert last["members"][1] == after["members"][1]
    assert after["members"][1]["pid"] != before["members"][1]["pid"]
    assert len(report["warnings"]) == 2


def drain(cluster: Any, status: Status, rank: int, seconds: int) -> str:
    """Tell Ray that the node of this rank will be preempted; its address."""
    import ray

    name = status.workers[rank].node
    ray.init(address=cluster.address, logging_level="error")
    try:
        [node_id] = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeManagerAddress"] == name]
    finally:
        ray.shutdown()
    command = ["drain-node", "--address", cluster.address, "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    command += ["--deadline-remaining-seconds", str(seconds)]
    subprocess.run([str(Path(sys.executable).with_name("ray")), *command], check=True, capture_output=True)
    return name


def test_nodes_are_drained(small_cluster: Any, storage_folder: Path, undisturbed: Report) -> None:
    """The first has a replacement on a third node; for the second there is no room, and the run goes on smaller."""
    small_cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20, node_ip_address="127.0.0.33")
    product = Product(storage_folder, str(small_cluster.address))
    try:
        running = product.begin("drained", "elastic.min_workers=1", "train.steps=100000", "elastic.max_failures=0")
        status = running.until_running(0, step=30)
        leaver = next(w for w in status.workers if w.node != "127.0.0.31")  # the head stays
        gone = drain(small_cluster, status, leaver.rank, 60)
        status = running.until_running(1)
        assert gone not in {w.node for w in status.workers}
        running.until("the node's release", lambda: (s := running.status()) and gone not in {n.node for n in s.nodes})
        running.until("the end of its worker", lambda: not psutil.pid_exists(leaver.pid))
        leaver = next(w for w in status.workers if w.node != "127.0.0.31")
        drain(small_cluster, status, leaver.rank, 12)
        status = running.until_running(2)
        assert status.world_size == 1
        ended = running.stop()
        assert ended.code == 130, ended.err
        report = product.report("drained")
    finally:
        product.close()
    assert_near(report, undisturbed)
    assert_nothing_failed(report)
    two, moved, one = report["generations"]
    assert report["loss"][: one["first_step"] - 1][:150] == undisturbed["loss"][: one["first_step"] - 1]
    assert [g["continuation"] for g in (two, moved, one)] == ["bit_exact", "bit_exact", "order_exact"]
    assert [g["source"] for g in (moved, one)] == ["memory", "memory"]
    assert moved["cause"] == f"node {gone} is drained"
