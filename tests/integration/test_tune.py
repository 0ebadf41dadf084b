"""Sweeps: trials are elastic runs that share a budget, and whatever is killed goes on.

About 80 s on two cores, most of it for processes to start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray
from product import MARK, TINY, Product, Running, mlflow_run
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from elastictrain.cli.runs import StoredRun
from elastictrain.config import TrainConfig
from elastictrain.events import CheckpointWritten, GenerationStarted
from elastictrain.runtime.slot_name import slot_name
from elastictrain.storage import Storage
from elastictrain.sweep.launch import STOPPED, TRIAL
from elastictrain.sweep.neighbours import Neighbours
from elastictrain.sweep.shares import Shares

PBT = """
name: pbt
trials: 2
workers: 2
search: grid
scheduler: pbt
report_every: 50
grace_steps: 100
space:
  train.learning_rate: {choice: [1.0e-6, 3.0e-3]}
"""


def test_a_run_takes_and_gives_up_workers_as_it_is_told(product: Product) -> None:
    """A budget's other trials begin and end: here a file says so."""
    config = TINY | {
        "run": {"name": "allotted", "storage": str(product.storage)},
        "elastic": {"min_workers": 1, "max_workers": 4, "standby": 0},
        "cluster": {"address": product.address},
        "train": TINY["train"] | {"steps": 100_000},
    }
    slots, order = product.folder / "allotted.slots", product.folder / "allotted.json"
    order.write_text(json.dumps({"config": config, "slots": str(slots)}))

    def allot(*numbers: int) -> None:
        new = slots.with_suffix(".new")
        new.write_text(json.dumps(dict(zip(nodes, numbers))))
        new.replace(slots)

    stored = StoredRun("allotted", Storage.open(str(product.storage)).run("allotted"))
    ray.init(product.address, logging_level="error", log_to_driver=False)
    try:
        nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
        allot(1)
        out, err, mark = product.folder / "allotted.out", product.folder / "allotted.err", "allotted"
        with out.open("wb") as out_file, err.open("wb") as err_file:
            process = subprocess.Popen(
                [sys.executable, "-m", TRIAL, str(order)],
                stdin=subprocess.PIPE, stdout=out_file, stderr=err_file,
                env=os.environ | {"OMP_NUM_THREADS": "1", MARK: mark},
            )  # fmt: skip
        running = Running("allotted", process, stored, out, err, mark)
        product.know(running)
        assert running.until_running(0, step=5).world_size == 1
        allot(1, 1)
        assert running.until_running(1, step=10).world_size == 2
        allot(0, 1)
        assert running.until_running(2, step=15).world_size == 1
        free = {node: ray.state.available_resources_per_node()[node].get("CPU", 0) for node in nodes}
        assert list(free.values()) == [2, 1], "what was given up is there for others"
        assert process.stdin is not None
        process.stdin.close()  # its starter is gone
        assert running.end().code == STOPPED
    finally:
        ray.shutdown()
    report = product.report("allotted")
    causes = [generation["cause"] for generation in report["generations"]]
    assert causes[2] == "workers are given up to others", causes
    assert (report["lost_steps"], report["failures"]) == (0, [])
    assert not [warning for warning in report["warnings"] if warning["topic"] == "room"]


def _slot(node: dict[str, Any], is_trial: bool) -> PlacementGroup:
    """As a run reserves one, which waits where there is no room."""
    name = slot_name("mine", 0, "somewhere", node["NodeID"], is_trial=is_trial)
    slot = placement_group([{"CPU": 1}], name=name, bundle_label_selector=[{"ray.io/node-id": node["NodeID"]}])
    if is_trial:
        ray.get(slot.ready(), timeout=30)
    return slot


def test_sweeps_share_a_cluster_by_rule_with_each_other_and_with_runs(small_cluster: Any, tmp_path: Path) -> None:
    """Two slots: the first sweep has both until another comes, and again when that has ended; a run goes before it."""
    small_cluster.wait_for_nodes()
    ray.init(small_cluster.address, logging_level="error", log_to_driver=False)
    told: dict[str, list[str]] = {"first": [], "second": []}

    def sweep(name: str) -> Shares:
        folder = tmp_path / name
        folder.mkdir()
        limits = {"elastic": {"min_workers": 1, "max_workers": 2, "cpus_per_worker": 1}}
        neighbours = Neighbours(f"file:///storage/_sweeps/{name}", told[name].append)
        return Shares(TrainConfig.from_dict(TINY | limits), 2, folder, neighbours)

    def slots(name: str) -> int:
        return sum(sum(json.loads(file.read_bytes()).values()) for file in (tmp_path / name).glob("*.slots"))

    def follow(until: Callable[[], bool], *shares: Shares) -> None:
        deadline = time.monotonic() + 30
        while not until():
            assert time.monotonic() < deadline, (slots("first"), slots("second"))
            for number, of_sweep in enumerate(shares):
                of_sweep.follow({f"trial-{number}": {}})
            time.sleep(0.1)

    try:
        first, second = sweep("first"), sweep("second")
        follow(lambda: slots("first") == 2, first)
        follow(lambda: (slots("first"), slots("second")) == (1, 1), first, second)
        assert told == {
            "first": ["the cluster is shared with sweep second: 1 of 2 workers"],
            "second": [
                "the cluster is shared with sweep first: 0 of 2 workers; a trial needs 1, and waits for them",
                "the cluster is shared with sweep first: 1 of 2 workers",
            ],
        }
        second._neighbours.leave()
        follow(lambda: slots("first") == 2, first)
        assert told["first"][1:] == ["the cluster is shared with nobody any more"]
        trials, mine = ([_slot(node, is_trial) for node in ray.nodes()] for is_trial in (True, False))
        follow(lambda: slots("first") == 1, first)  # both are awaited, and a trial needs one
        for slot in trials:
            remove_placement_group(slot)
        follow(lambda: slots("first") == 0, first)
        for slot in mine:
            remove_placement_group(slot)
        follow(lambda: slots("first") == 2, first)
        assert told["first"][2:] == [
            "the cluster is shared with run mine: 1 of 2 workers",
            "the cluster is shared with run mine: 0 of 2 workers; a trial needs 1, and waits for them",
            "the cluster is shared with nobody any more",
        ]
    finally:
        ray.shutdown()


def test_a_population_learns_from_its_best_and_survives_what_is_killed(product: Product) -> None:
    space = product.folder / "pbt.yaml"
    space.write_text(PBT)
    options = ("elastic.min_workers=1", "train.steps=500", "checkpoint.keep_last=2")
    sweep = product.begin("ignored", *options, command=("tune", "--space", str(space)))
    storage = Storage.open(str(product.storage))
    leg = StoredRun("pbt-1.2", storage.run("pbt-1.2"))

    def trained() -> int:
        return int(leg.storage.exists("status.json") and (s := leg.status()) and s.status == "running" and s.step)

    at = sweep.until("the worse trial goes on from the better one", trained)
    status = leg.status()
    assert status is not None
    psutil.Process(status.workers[0].pid).kill()
    sweep.until("it goes on without the worker that was killed", lambda: trained() > at)
    sweep.process.kill()
    sweep.process.wait()
    record = product.storage / "_sweeps" / "pbt" / "sweep.json"
    assert json.loads(record.read_bytes())["trials"][0]["state"] == "running"

    resumed = product.begin("ignored", *options, command=("tune", "--space", str(space)))
    ended = resumed.end()
    assert ended.code == 0, ended.out + ended.err
    assert "step 500" in ended.out
    trials = json.loads(record.read_bytes())["trials"]
    assert [t["state"] for t in trials] == ["complete", "complete"], ended.out
    first = trials[0]
    assert [step["run"] for step in first["legs"]][:2] == ["pbt-1", "pbt-1.2"]
    [start, *_] = [e for e in leg.events() if isinstance(e, CheckpointWritten)]
    donor, _, step = first["legs"][1]["start_from"].partition("@")
    assert start.origin.endswith(f"/{donor}/checkpoints/step-{int(step):08d}")
    generations = [e for e in leg.events() if isinstance(e, GenerationStarted)]
    assert (generations[0].source, generations[0].first_step) == ("durable", int(step) + 1)
    assert f"from checkpoint {step} of {donor}" in product.ask("lineage", "pbt-1.2").out

    client, parent = mlflow_run(product.storage, "pbt")
    nested = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {"pbt-1", "pbt-1.2", "pbt-2"} <= {run.info.run_name for run in nested}
    assert parent.info.status == "FINISHED"
    assert (product.storage / "_sweeps" / "pbt" / "sweep.svg").read_text().startswith("<svg ")
    again = product.begin("ignored", *options, command=("tune", "--space", str(space))).end()
    assert again.code == 0
    assert "starts" not in again.out, "there is nothing left to do"
