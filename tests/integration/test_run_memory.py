"""Runs that run out of memory go on with a leaner layout: the same samples, the same loss curve. About 80 s."""

from __future__ import annotations

import json

from product import Product, Report

OOM = {"at": 20, "rank": 1, "kind": "oom", "phase": "forward"}
KILL = {"at": 30, "rank": 0, "kind": "kill"}
DRIFT = 0.03
"""Relative difference that other dropout masks make to the loss of a step, at most; 0.013 was seen."""


def test_the_micro_batch_is_halved_for_good(product: Product, undisturbed: Report) -> None:
    """Out of memory, then a worker's death, then a stop and a resume."""
    running = product.begin("memory", f"faults={json.dumps([OOM, KILL])}")
    running.until_running(2, step=35)
    ended = running.stop()
    assert ended.code == 130, ended.err
    ended = product.train("memory")
    assert ended.code == 0, ended.err
    report = product.report("memory")
    assert report["status"] == "complete"
    assert report["sample_digest"] == undisturbed["sample_digest"]

    first, halved, recovered, resumed = report["generations"]
    assert [g["layout"]["micro_batch"] for g in report["generations"]] == [2, 1, 1, 1]
    assert [g["layout"]["accumulation"] for g in report["generations"]] == [2, 4, 4, 4]
    assert [g["continuation"] for g in report["generations"]] == ["bit_exact", "order_exact", "bit_exact", "bit_exact"]
    assert halved["members"] == first["members"], "nobody is replaced"
    assert (recovered["source"], resumed["source"]) == ("memory", "durable")
    failure, _ = report["failures"]
    assert (failure["kind"], failure["cause"]["kind"], failure["ranks"]) == ("oom", "oom", [1])
    assert failure["cause"]["message"] == "OutOfMemoryError: planned fault 0: out of memory at step 20"
    assert failure["injected"]
    assert failure["step"] == 20
    assert failure["lost_steps"] <= 1
    told, kept = [w["message"] for w in report["warnings"] if w["topic"] == "memory"]
    assert "Set train.micro_batch=1 to have it from the start" in told
    assert "the run goes on with dp2 zero1 1x4, to which it has come for lack of memory" in kept
    assert "dp2 zero1 2x2 would need" in report["layouts"][1]["why"]
    assert report["config"]["train"]["micro_batch"] == 2

    begun = halved["first_step"]
    ours, theirs = ([loss for _, loss in r["loss"]] for r in (report, undisturbed))
    assert ours[: begun - 1] == theirs[: begun - 1]
    assert max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)) < DRIFT


def test_a_run_that_never_fits_says_what_to_change(product: Product) -> None:
    fault = OOM | {"at": 5, "repeat": True}
    ended = product.train("too-large", f"faults={json.dumps([fault])}", "elastic.max_failures=0")
    assert ended.code == 5
    for word in ("out of memory", "step 5", "micro-batch 1", "recompute", "more workers", "data.seq_len"):
        assert word in ended.err
    report = product.report("too-large")
    assert report["status"] == "failed"
    assert report["steps"] == 4
    assert [g["layout"]["micro_batch"] for g in report["generations"]][:2] == [2, 1]
    needs = [layout["memory_bytes"] for layout in report["layouts"]]
    assert len(needs) == len(report["generations"]) > 2, "everything leaner is tried"
    assert needs == sorted(needs, reverse=True)
    assert {f["kind"] for f in report["failures"]} == {"oom"}
