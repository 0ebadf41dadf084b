"""Runs whose world changes: a node is lost and another comes; a resume with other workers and another ZeRO stage.

The samples stay the same, and the losses but for the order of float sums. About 80 s on two cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
from product import Product, Report, assert_near, copied, kill


def test_a_node_dies_and_another_comes(small_cluster: Any, storage_folder: Path, undisturbed: Report) -> None:
    product = Product(storage_folder, str(small_cluster.address))
    try:
        running = product.begin("nodes", "elastic.min_workers=1", "train.steps=100000")
        running.until_step(30)
        [node] = small_cluster.worker_nodes
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        kill([raylet, *raylet.children(recursive=True)])
        status = running.until_running(generation=1)
        assert status.world_size == 1
        small_cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20, node_ip_address="127.0.0.33")
        grown = running.until_running(generation=2)
        assert grown.world_size == 2
        ended = running.stop()
        assert ended.code == 130, ended.err
        report = product.report("nodes")
    finally:
        product.close()
    assert_near(report, undisturbed)
    [failure] = report["failures"]
    assert failure["kind"] == "node_lost"
    assert failure["ranks"] == [1]
    assert failure["lost_steps"] <= 1
    two, one, two_again = report["generations"]
    assert report["loss"][: one["first_step"] - 1] == undisturbed["loss"][: one["first_step"] - 1]
    assert [g["world_size"] for g in (two, one, two_again)] == [2, 1, 2]
    assert [g["continuation"] for g in (two, one, two_again)] == ["bit_exact", "order_exact", "order_exact"]
    assert [g["source"] for g in (two, one, two_again)] == ["fresh", "memory", "memory"]
    assert one["layout"]["accumulation"] == 4
    assert "resize" in two_again["cause"]
    assert report["lost_steps"] == failure["lost_steps"]  # a resize loses nothing


def test_a_resume_with_another_layout(product: Product, stopped: Path, undisturbed: Report, tmp_path: Path) -> None:
    """ZeRO 1 on two workers, then ZeRO 3 on one, then ZeRO 2 on two."""
    storage = copied(stopped, tmp_path / "storage")
    stopped_at = product.report("stopped", storage)["steps"]
    running = product.begin(
        "stopped", "elastic.min_workers=1", "elastic.max_workers=1", "parallel.zero_stage=3", storage=storage
    )
    running.until_step(stopped_at + 10)
    ended = running.stop()
    assert ended.code == 130, ended.err
    ended = product.train("stopped", "parallel.zero_stage=2", storage=storage)
    assert ended.code == 0, ended.err
    report = product.report("stopped", storage)
    assert report["status"] == "complete"
    assert_near(report, undisturbed)
    assert report["sample_digest"] == undisturbed["sample_digest"]
    worlds = [(g["layout"]["zero_stage"], g["world_size"], g["continuation"]) for g in report["generations"]]
    assert worlds == [(1, 2, "bit_exact"), (3, 1, "order_exact"), (2, 2, "order_exact")]
    first = report["generations"][1]["first_step"]
    assert report["loss"][: first - 1] == undisturbed["loss"][: first - 1]
    assert report["lost_steps"] == 0
