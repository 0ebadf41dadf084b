"""Runs whose ranks stop moving, or move slowly: found by the run's own pace, the guilty named and replaced.

About 60 s on two cores.
"""

from __future__ import annotations

import json
import os
import signal
from itertools import pairwise
from pathlib import Path

from product import Product, Report, assert_same_training

PLAN = [
    {"at": 30, "rank": 1, "kind": "stop", "phase": "backward"},
    {"at": 60, "rank": 0, "kind": "loop", "phase": "forward"},
    {"at": 90, "rank": 1, "kind": "loop", "phase": "update"},
]
PATIENCE_S = 1.5


def test_ranks_that_hang_are_replaced(product: Product, undisturbed: Report) -> None:
    ended = product.train(
        "hanging",
        f"faults={json.dumps(PLAN)}",
        f"elastic.hang_patience_s={PATIENCE_S}",
        "elastic.standby=1",
    )
    assert ended.code == 0, ended.err
    report = product.report("hanging")
    assert_same_training(report, undisturbed)
    failures = report["failures"]
    assert [(f["kind"], f["cause"]["kind"], f["ranks"], f["step"]) for f in failures] == [
        ("hang", "hang", [fault["rank"]], fault["at"]) for fault in PLAN
    ]
    stopped, first, second = failures
    assert "process is stopped" in stopped["cause"]["message"]
    assert "no progress for" in first["cause"]["message"]
    assert "in forward; 1 of 2 ranks wait for it" in first["cause"]["message"]
    for looping in (first, second):
        assert "in _compute_for_ever" in looping["cause"]["traceback"]  # where it hangs, from its own stacks
    for failure, before, after in zip(failures, report["generations"], report["generations"][1:], strict=False):
        assert failure["lost_steps"] <= 1
        assert after["source"] == "memory"
        other = 1 - failure["ranks"][0]
        assert after["members"][other] == before["members"][other]
    assert report["stragglers"] == []


def test_a_spare_that_is_stopped_takes_no_rank(product: Product, undisturbed: Report) -> None:
    """It is found while it waits for one, and when a group waits for it: not at the deadline for groups to form."""
    running = product.begin("stopped-spare", "elastic.standby=1", "train.steps=100000")
    running.until_running(0)  # before, whoever waits gets a rank
    [idle] = running.until("a standby", lambda: (s := running.status()) and s.standbys)
    os.kill(idle.pid, signal.SIGSTOP)
    [spare] = running.until(
        "another", lambda: (s := running.status()) and [spare for spare in s.standbys if spare.pid != idle.pid]
    )
    assert not Path(f"/proc/{idle.pid}").exists()
    status = running.until_running(0)
    os.kill(spare.pid, signal.SIGSTOP)
    os.kill(status.workers[1].pid, signal.SIGKILL)
    status = running.until_running(2)
    assert spare.pid not in [worker.pid for worker in status.workers]
    ended = running.stop()
    assert ended.code == 130
    assert f"(pid {idle.pid}, node" in ended.out
    assert "): its process is stopped" in ended.out
    report = product.report("stopped-spare")
    assert_same_training(report, undisturbed)
    killed, stopped = report["failures"]
    assert (killed["kind"], killed["ranks"], killed["generation"]) == ("worker_lost", [1], 0)
    assert (stopped["kind"], stopped["ranks"], stopped["generation"]) == ("hang", [1], 1)
    assert "process is stopped" in stopped["cause"]["message"]
    assert stopped["recovered_s"] < 60
    assert report["lost_steps"] <= 1


def test_a_slow_rank_is_named(product: Product, undisturbed: Report) -> None:
    fault = {"at": 60, "rank": 1, "kind": "slow", "seconds": 0.03, "phase": "forward"}
    ended = product.train("slow", f"faults=[{json.dumps(fault)}]")
    assert ended.code == 0, ended.err
    report = product.report("slow")
    assert_same_training(report, undisturbed)
    assert report["failures"] == []
    [straggler] = report["stragglers"]
    assert straggler["rank"] == 1
    assert 60 < straggler["step"] <= 80
    assert straggler["own_s"] > 1.5 * straggler["others_s"]
    assert "rank 1 (node" in ended.out
    assert "is slow: it works" in ended.out


def test_a_slow_rank_is_replaced_where_that_is_wanted(product: Product, undisturbed: Report) -> None:
    fault = {"at": 20, "rank": 1, "kind": "slow", "seconds": 0.1, "phase": "forward"}
    ended = product.train("slow-out", f"faults=[{json.dumps(fault)}]", "elastic.straggler=replace", "elastic.standby=1")
    assert ended.code == 0, ended.err
    report = product.report("slow-out")
    assert_same_training(report, undisturbed)
    assert (report["failures"], report["lost_steps"]) == ([], 0)
    before, after = report["generations"]
    assert after["cause"] == "rank 1 is slow"
    assert after["members"][0] == before["members"][0]
    assert after["members"][1]["pid"] != before["members"][1]["pid"]


def test_a_rank_that_leaves_out_a_collective_is_replaced(product: Product, undisturbed: Report) -> None:
    """It is further than the others, and has entered no more collectives; or, within one phase, it is in another
    one than all were in at this place of the step before.
    """
    plan = [{"at": at, "rank": 1, "kind": "skip", "phase": phase} for at, phase in ((40, "backward"), (90, "update"))]
    ended = product.train(
        "skipping", f"faults={json.dumps(plan)}", f"elastic.hang_patience_s={PATIENCE_S}", "elastic.standby=1"
    )
    assert ended.code == 0, ended.err
    report = product.report("skipping")
    assert_same_training(report, undisturbed)
    assert [(f["kind"], f["ranks"], f["step"]) for f in report["failures"]] == [("hang", [1], 40), ("hang", [1], 90)]
    for failure in report["failures"]:
        assert "left out a collective that the others wait in" in failure["cause"]["message"]
    for before, after in pairwise(report["generations"]):
        assert after["source"] == "memory"
        assert after["members"][0] == before["members"][0]
        assert after["members"][1]["pid"] != before["members"][1]["pid"]
