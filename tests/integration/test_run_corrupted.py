"""Memory of a worker changes by itself: the worker is replaced, and the losses are those of the undisturbed run.

About 40 s on two cores.
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
    ended = product.train("flipped", f"faults={json.dumps(PLAN)}")
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
    assert "masters or moments of rank 0 changed" in failures[1]["cause"]["message"]
    for failure, before, after in zip(failures, generations, generations[1:], strict=False):
        assert failure["source"] == "memory"
        assert failure["continuation"] == "bit_exact"
        [odd] = failure["ranks"]
        assert failure["node"] == before["members"][odd]["node"]
        assert failure["pid"] == before["members"][odd]["pid"] != after["members"][odd]["pid"]
        assert before["members"][1 - odd] == after["members"][1 - odd]
    assert [c["step"] for c in report["rejected_checkpoints"]] in ([100], [])  # if its write was as fast as the search
    assert [c["step"] for c in report["checkpoints"]][-1] == 150
