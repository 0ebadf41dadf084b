"""A mixture of experts whose experts two nodes share: a worker is killed, and the losses are the same bit for bit.

About 25 s on two cores.
"""

from __future__ import annotations

import json

from product import Product, assert_recorded, assert_same_training, mlflow_run

EXPERTS = ("model.num_experts=4", "model.intermediate_size=48", "train.steps=24")
SHARED = ("parallel={layout: manual, ep: 2}", "elastic.min_workers=1")
KILL = {"at": 12, "rank": 1, "kind": "kill", "phase": "backward"}


def test_a_worker_that_holds_experts_is_killed(product: Product) -> None:
    ended = product.train("whole", *EXPERTS, *SHARED)
    assert ended.code == 0, ended.err
    whole = product.report("whole")
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
