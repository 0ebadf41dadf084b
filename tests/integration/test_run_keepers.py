"""A run whose keeper dies: its node's ranks keep their processes, and the state comes from the buddy's memory.

Two ranks on each node, so what they are told goes through the keepers. About 25 s on two cores.
"""

from __future__ import annotations

from typing import Any

from product import Product, Report, assert_near, kill, marked


def test_a_keeper_dies(product: Product, shared_cluster: Any, undisturbed: Report) -> None:
    running = product.begin("keeper", "train.steps=100000", "elastic.max_workers=4")
    running.until_step(30)
    keeper, *_ = [p for p in marked(shared_cluster.mark) if p.name().startswith("ray::Keeper")]
    kill([keeper])
    running.until_running(generation=1)
    running.until_step(60)
    ended = running.stop()
    assert ended.code == 130, ended.err
    report = product.report("keeper")
    assert_near(report, undisturbed)
    [failure] = report["failures"]
    assert (failure["kind"], failure["pid"]) == ("keeper_lost", keeper.pid)
    assert failure["source"] == "memory"
    assert failure["lost_steps"] <= 1
    before, after = report["generations"]
    assert len(after["members"]) == 4
    assert after["members"] == before["members"]
    assert after["continuation"] == "bit_exact"
