"""A driver that is killed while its cluster lives on: the same command finds the state in the keepers' memory.

About 60 s on two cores: two starts for each of two runs.
"""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from product import (
    Product,
    Report,
    Running,
    assert_near,
    assert_recorded,
    assert_same_training,
    eventually_none,
    marked,
)

from elastictrain.events import CheckpointWritten

STEPS = "train.steps=400"


def kill_driver(running: Running) -> None:
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.wait()


def named(cluster: Any, actor: str) -> list[Any]:
    return [p for p in marked(cluster.mark) if p.name().startswith(f"ray::{actor}")]


def test_the_next_driver_goes_on_from_memory(product: Product, shared_cluster: Any, undisturbed: Report) -> None:
    running = product.begin("orphans", STEPS)
    running.until("a checkpoint", lambda: running.told(CheckpointWritten))
    running.until_step(60)
    kill_driver(running)
    status = json.loads(product.ask("status", "orphans", "--json").out)
    assert (status["status"], {w["state"] for w in status["workers"]}) == ("interrupted", {"unknown"})
    assert "goes on from memory" in status["message"]
    assert not eventually_none(lambda: named(shared_cluster, "Worker"))
    keepers = {p.pid for p in named(shared_cluster, "Keeper")}
    assert len(keepers) == 2
    interrupted = product.report("orphans")

    running = product.begin("orphans", STEPS)
    running.until_running(generation=1)
    assert {p.pid for p in named(shared_cluster, "Keeper")} == keepers, "they are taken over, not copied"
    ended = running.end()
    assert ended.code == 0, ended.err
    report = product.report("orphans")
    assert_same_training(report, undisturbed)
    assert_recorded(product.storage, report)
    assert [a["status"] for a in report["attempts"]] == [None, "complete"]
    first, resumed = report["generations"]
    assert (resumed["cause"], resumed["source"], resumed["continuation"]) == ("resume", "memory", "bit_exact")
    assert resumed["first_step"] > interrupted["steps"] > 50, "the newest checkpoint is of step 50"
    assert resumed["index"] > first["index"]
    [failure] = report["failures"]
    assert (failure["kind"], failure["pid"]) == ("driver_lost", int(interrupted["environment"]["pid"]))
    assert failure["source"] == "memory"
    assert report["lost_steps"] == failure["lost_steps"] <= 1


def test_another_layout_and_nobody(product: Product, shared_cluster: Any, undisturbed: Report) -> None:
    """Memory serves another ZeRO stage and world size as well; and where nobody comes back it is freed."""
    running = product.begin("heirs", STEPS)
    running.until_step(60)
    kill_driver(running)
    told = product.report("heirs")["steps"]

    one = ("parallel.zero_stage=2", "elastic.min_workers=1", "elastic.max_workers=1", "elastic.orphan_timeout_s=5")
    running = product.begin("heirs", STEPS, *one)
    running.until_running(generation=1)
    kill_driver(running)
    assert not eventually_none(lambda: named(shared_cluster, "Keeper"), patience_s=30)
    report = product.report("heirs")
    assert_near(report, undisturbed)
    resumed = report["generations"][-1]
    assert (resumed["source"], resumed["continuation"], resumed["world_size"]) == ("memory", "order_exact", 1)
    assert resumed["first_step"] > told
    assert report["lost_steps"] <= 1
