"""Runs whose workers die, one way or another, give bit for bit the losses of the run to which nothing happens.

About 100 s on two cores: a worker takes some 5 s to come up, and one that dies must be replaced.
"""

from __future__ import annotations

import json
import os
import random
import signal

from product import Product, Report, assert_same_training

from elastictrain.status import Status


def test_nothing_happens(undisturbed: Report) -> None:
    assert undisturbed["status"] == "complete"
    assert undisturbed["failures"] == []
    assert undisturbed["lost_steps"] == 0
    assert undisturbed["warnings"] == []
    [generation] = undisturbed["generations"]
    assert generation["cause"] == "start"
    assert generation["source"] == "fresh"
    assert [c["step"] for c in undisturbed["checkpoints"]] == [50, 100, 150]
    assert undisturbed["loss"][-1][1] < undisturbed["loss"][0][1] - 1
    assert 0 < undisturbed["evaluation"]["bits_per_byte"] < 8


PLAN = [
    {"at": 20, "rank": 1, "kind": "kill", "phase": "backward"},
    {"at": 45, "rank": 0, "kind": "segfault", "phase": "forward"},
    {"at": 70, "rank": 1, "kind": "exit", "phase": "update"},
    {"at": 95, "rank": 0, "kind": "kill", "phase": "snapshot"},
    {"at": 120, "rank": 1, "kind": "exception", "phase": "forward"},
]
CAUSES = ["SIGKILL", "SIGSEGV", "exit code 1", "SIGKILL", "InjectedError: planned fault 4: exception at step 120"]


def test_workers_die_by_plan(product: Product, undisturbed: Report) -> None:
    ended = product.train("planned", f"faults={json.dumps(PLAN)}")
    assert ended.code == 0, ended.err
    report = product.report("planned")
    assert report["status"] == "complete"
    assert_same_training(report, undisturbed)

    failures, generations = report["failures"], report["generations"]
    assert [f["cause"]["message"] for f in failures] == CAUSES
    assert [f["kind"] for f in failures] == ["worker_lost"] * 4 + ["user_error"]
    assert [f["ranks"] for f in failures] == [[fault["rank"]] for fault in PLAN]
    assert [f["step"] for f in failures] == [fault["at"] for fault in PLAN]
    assert [f["index"] for f in report["faults_injected"]] == [0, 1, 2, 3, 4]
    assert len(generations) == len(PLAN) + 1
    for failure, before, after in zip(failures, generations, generations[1:], strict=False):
        assert failure["injected"]
        assert failure["detected_s"] < 1
        assert failure["lost_steps"] <= 1
        assert failure["source"] == after["source"] == "memory"
        assert failure["continuation"] == after["continuation"] == "bit_exact"
        assert after["first_step"] in (failure["step"], failure["step"] + 1)
        assert after["cause"] == failure["cause"]["message"]
        stayed = {0, 1} - set(failure["ranks"]) if failure["kind"] == "worker_lost" else {0, 1}
        for rank in stayed:
            assert after["members"][rank] == before["members"][rank]
        for rank in {0, 1} - stayed:
            assert failure["pid"] == before["members"][rank]["pid"] != after["members"][rank]["pid"]
    assert report["lost_steps"] == sum(f["lost_steps"] for f in failures)
    assert "InjectedError" in failures[-1]["cause"]["traceback"]
    assert "in strike" in failures[-1]["cause"]["traceback"]


def test_workers_are_killed_from_outside(product: Product, undisturbed: Report) -> None:
    """One at a random moment; both at once, and the keepers have the state; one for which a standby waits."""
    running = product.begin("killed", "elastic.standby=1", "train.steps=100000")
    chance = random.Random()

    def kill(status: Status, *ranks: int) -> int:
        pids = {worker.rank: worker.pid for worker in status.workers}
        for rank in ranks:
            os.kill(pids[rank], signal.SIGKILL)
        return status.generation + 1

    generation = kill(running.until_running(0, step=chance.randrange(5, 50)), chance.randrange(2))
    generation = kill(running.until_running(generation, step=chance.randrange(50, 100)), 0, 1)
    running.until_running(generation)
    running.until("a standby", lambda: (s := running.status()) and s.standbys)
    status = running.until_running(generation)
    [standby] = status.standbys
    generation = kill(status, 1)
    status = running.until_running(generation)
    assert status.workers[1].pid == standby.pid
    ended = running.stop()
    assert ended.code == 130, ended.err

    report = product.report("killed")
    assert_same_training(report, undisturbed)
    assert [f["cause"]["message"] for f in report["failures"]] == ["SIGKILL"] * 4
    assert not any(f["injected"] for f in report["failures"])
    assert {g["source"] for g in report["generations"][1:]} == {"memory"}
    assert {g["continuation"] for g in report["generations"]} == {"bit_exact"}
    assert all(f["recovered_s"] is not None for f in report["failures"])
    assert report["failures"][-1]["recovered_s"] < 5
    assert report["lost_steps"] <= 3
