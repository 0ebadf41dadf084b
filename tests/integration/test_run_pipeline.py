"""A model split into two stages: a rank is killed, the run goes on with one replica, and then with another layout.

The samples stay the same, and the losses but for the order of float sums. About 45 s on two cores.
"""

from __future__ import annotations

from pathlib import Path

from product import Product, Report, assert_near

PIPELINE = ("parallel.layout=manual", "parallel.pp=2")


def test_a_killed_stage_costs_a_replica_and_another_layout_goes_on(
    product: Product, undisturbed: Report, tmp_path: Path
) -> None:
    """pp2 x dp2, then pp2 x dp1 on the survivors, then ZeRO 2 on two workers, from storage."""
    storage = tmp_path / "storage"
    storage.mkdir()
    running = product.begin(
        "pipeline",
        *PIPELINE,
        "elastic.max_workers=4",
        "elastic.replace_timeout_s=0.05",  # nobody waits for a new worker
        "faults=[{at: 20, rank: 3, kind: kill}]",
        storage=storage,
    )
    status = running.until_running(generation=1, step=40)
    assert "pp2" in status.layout
    ended = running.stop()
    assert ended.code == 130, ended.err
    ended = product.train("pipeline", "parallel.zero_stage=2", storage=storage)
    assert ended.code == 0, ended.err
    report = product.report("pipeline", storage)
    assert report["status"] == "complete"
    assert_near(report, undisturbed)
    [failure] = report["failures"]
    assert (failure["ranks"], failure["kind"]) == ([3], "worker_lost")
    assert failure["lost_steps"] <= 1
    four, two, *grown, last = report["generations"]
    assert four["layout"] == {"dp": 2, "pp": 2, "zero_stage": 1, "micro_batch": 2, "accumulation": 2}
    assert two["layout"] == {"dp": 1, "pp": 2, "zero_stage": 1, "micro_batch": 2, "accumulation": 4}
    assert all(g["layout"] == four["layout"] for g in grown), "the killed worker's replacement, once it is there"
    assert last["layout"] == {"dp": 2, "zero_stage": 2, "micro_batch": 2, "accumulation": 2}
    assert [g["source"] for g in (four, two, last)] == ["fresh", "memory", "durable"]
    assert [g["continuation"] for g in (two, last)] == ["order_exact", "order_exact"]
