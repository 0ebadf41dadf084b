"""Memory of a worker changes by itself: the worker is replaced, and the losses are those of the undisturbed run.

About 80 s on two cores.
"""

from __future__ import annotations

import json

from product import Product, Report, assert_same_training

PLAN = [
    {"at": 30, "rank": 1, "kind": "bitflip"},
    {"at": 71, "rank": 0, "kind": "bitflip", "where": "optimizer", "phase": "forward"},
    {"at": 100, "rank": 1, "kind": "bitflip", "where": "optimizer", "phase": "snapshot"},
]
"""In the weights; in the masters; and in the masters before they are copied, just when that is a checkpoint."""


def test_flipped_bits_never_get_into_the_run(product: Product, undisturbed: Report) -> None:
    ended = product.train("flipped", f"faults={json.dumps(PLAN)}", "snapshot.every=1")
    assert ended.code == 0, ended.err
    report = product.report("flipped")
    assert report["status"] == "complete"
    assert_same_training(report, undisturbed)

    failures, generations = report["failures"], report["generations"]
    assert [f["index"] for f in report["faults_injected"]] == [0, 1, 2]
    assert [(f["kind"], f["cause"]["kind"]) for f in failures] == [("corrupted", "corrupted")] * 3
    assert [f["ranks"] for f in failures] == [[fault["rank"]] for fault in PLAN]
    assert [f["step"] for f in failures] == [30, 71, 101]  # each is found before the next update
    assert [f["lost_steps"] for f in failures] == [0, 0, 1]
    assert [g["first_step"] for g in generations] == [1, 30, 71, 100]
    assert "differs from the other ranks'" in failures[0]["cause"]["message"]
    assert "param/embedding.weight[0:] and what follows it of rank 0 changed" in failures[1]["cause"]["message"]
    for failure, before, after in zip(failures, generations, generations[1:], strict=False):
        assert failure["source"] == "memory"
        assert failure["continuation"] == "bit_exact"
        [odd] = failure["ranks"]
        assert failure["node"] == before["members"][odd]["node"]
        assert failure["pid"] == before["members"][odd]["pid"] != after["members"][odd]["pid"]
        assert before["members"][1 - odd] == after["members"][1 - odd]
    assert [c["step"] for c in report["rejected_checkpoints"]] in ([100], [])  # if its write was as fast as the search
    assert [c["step"] for c in report["checkpoints"]][-1] == 150


def test_with_rare_searches_the_run_goes_back_to_what_was_verified(product: Product, undisturbed: Report) -> None:
    """The states of 60 and 70 are looked at, and that of 62 is a checkpoint."""
    fault = {"at": 71, "rank": 0, "kind": "bitflip", "where": "optimizer"}
    knobs = ["elastic.verify_every=10", "checkpoint.every=31", "snapshot.every=1", "train.steps=100"]
    ended = product.train("rarely", f"faults={json.dumps([fault])}", *knobs)
    assert ended.code == 0, ended.err
    report = product.report("rarely")
    assert_same_training(report, undisturbed)
    [failure] = report["failures"]
    assert (failure["kind"], failure["ranks"], failure["step"]) == ("corrupted", [0], 71)
    assert (failure["source"], failure["lost_steps"]) == ("durable", 70 - 31)
    assert [g["first_step"] for g in report["generations"]] == [1, 32]
    [rejected] = report["rejected_checkpoints"]
    assert rejected["step"] == 62
    assert "up to step 60" in rejected["problem"]
    assert [c["step"] for c in report["checkpoints"]] == [31, 62, 93, 100]
