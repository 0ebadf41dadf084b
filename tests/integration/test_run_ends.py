"""How runs end, and how the same command goes on: a bug, a stop, a second driver, another config, a killed driver.

About 90 s on two cores.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from product import STEPS, Product, Report, assert_recorded, assert_same_training, copied, eventually_none

from elastictrain.events import CheckpointWritten, RunStarted


def journal(storage: Path, name: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (storage / name / "journal").iterdir()}


def test_a_bug_ends_the_run_with_its_traceback(product: Product) -> None:
    fault = {"at": 7, "rank": 1, "kind": "exception", "phase": "forward", "repeat": True}
    ended = product.train("bug", f"faults=[{json.dumps(fault)}]")
    assert ended.code == 4
    assert ended.err.startswith("error: Traceback (most recent call last):")
    assert "InjectedError: planned fault 0: exception at step 7" in ended.err
    report = product.report("bug")
    assert report["status"] == "failed"
    assert report["steps"] == 6
    assert {f["kind"] for f in report["failures"]} == {"user_error"}
    assert {tuple(f["ranks"]) for f in report["failures"]} == {(1,)}
    assert len(report["failures"]) == 2  # once more, to see whether it was an accident
    assert "InjectedError" in report["attempts"][0]["cause"]["traceback"]
    assert report["checkpoints"][-1]["step"] == 6


def test_a_stop_before_training_is_a_stop_too(alone: Product) -> None:
    running = alone.begin("early")
    running.until("the attempt", lambda: bool(running.told(RunStarted)))
    running.process.send_signal(signal.SIGTERM)
    ended = running.end()
    assert (ended.code, ended.err) == (130, "interrupted\n")
    assert not eventually_none(running.family)
    assert json.loads(alone.ask("status", "early", "--json").out)["status"] == "stopped"
    assert alone.report("early")["attempts"][0]["cause"]["message"] == "SIGTERM received"


def test_a_stopped_run_goes_on(product: Product, stopped: Path, undisturbed: Report, tmp_path: Path) -> None:
    storage = copied(stopped, tmp_path / "storage")
    before = product.report("stopped", storage)
    assert before["status"] == "stopped"
    assert 20 <= before["steps"] < STEPS
    record = assert_recorded(storage, before)
    code, [newest, *_] = product.checkpoints("stopped", "--verify", storage=storage)  # it may have passed step 50
    assert code == 0
    assert (newest["step"], newest["verified"]) == (before["steps"], True)
    assert json.loads(product.ask("status", "stopped", "--json", storage=storage).out)["status"] == "stopped"

    other = product.train("stopped", "train.seed=4", "model.dropout=0.2", storage=storage)
    assert other.code == 3
    assert "train.seed was 3 and is now 4" in other.err
    assert "model.dropout was 0.1 and is now 0.2" in other.err

    running = product.begin("stopped", storage=storage)
    running.until("attempt 2", lambda: len(running.told(RunStarted)) == 2)
    second = product.train("stopped", storage=storage)
    assert second.code == 3
    assert f"is being trained now by process {running.process.pid}" in second.err
    ended = running.end()
    assert ended.code == 0, ended.err

    report = product.report("stopped", storage)
    assert report["status"] == "complete"
    assert_same_training(report, undisturbed)
    assert assert_recorded(storage, report) == record
    assert [a["status"] for a in report["attempts"]] == ["stopped", "complete"]
    assert report["attempts"][0]["cause"]["message"] == "SIGTERM received"
    first, resumed = report["generations"]
    assert (resumed["cause"], resumed["source"], resumed["continuation"]) == ("resume", "durable", "bit_exact")
    assert resumed["first_step"] == before["steps"] + 1
    assert resumed["index"] > first["index"]
    assert report["lost_steps"] == 0
    assert report["goodput"]["down"] > 0

    told = journal(storage, "stopped")
    again = product.train("stopped", storage=storage)
    assert again.code == 0
    assert "complete" in again.out
    assert "nothing to do" in again.out
    fewer = product.train("stopped", f"train.steps={STEPS - 1}", storage=storage)
    assert fewer.code == 3
    assert f"train.steps {STEPS - 1} is less than the {STEPS} steps that the run has done" in fewer.err
    assert journal(storage, "stopped") == told


def test_a_cluster_is_joined_by_its_name_in_the_config(product: Product, tmp_path: Path) -> None:
    """It has no token, and the environment says nothing of clusters or tokens."""
    silent = {name: None for name in os.environ if name.startswith("RAY_")} | {"HOME": str(tmp_path)}
    ended = product.begin("joined", "train.steps=3", environment=silent).end()
    assert ended.code == 0, ended.err


def test_a_killed_driver_and_damaged_checkpoints(alone: Product, undisturbed: Report) -> None:
    """The embedded cluster dies with its driver; the next attempt takes the newest checkpoint that is whole."""
    overrides = ("checkpoint.every=10", "checkpoint.keep_last=5")
    running = alone.begin("killed-driver", *overrides)
    running.until("five checkpoints", lambda: len(running.told(CheckpointWritten)) >= 5)
    os.kill(running.process.pid, signal.SIGKILL)
    assert not eventually_none(running.family)
    assert running.process.wait() == -signal.SIGKILL
    status = json.loads(alone.ask("status", "killed-driver", "--json").out)
    assert status["status"] == "interrupted"
    interrupted = alone.report("killed-driver")
    assert interrupted["status"] == "interrupted"

    _, whole = alone.checkpoints("killed-driver")
    assert all(c["sha256"] for c in whole)
    damaged = [damage(whole[0], flip_a_bit), damage(whole[1], truncate), damage(whole[2], remove_the_manifest)]
    code, verified = alone.checkpoints("killed-driver", "--verify")
    assert code == 1
    assert {c["step"]: c["verified"] for c in verified} == {c["step"]: c["step"] not in damaged for c in verified}

    ended = alone.train("killed-driver", *overrides)
    assert ended.code == 0, ended.err
    report = alone.report("killed-driver")
    assert_same_training(report, undisturbed)
    assert [a["status"] for a in report["attempts"]] == [None, "complete"]
    never_completed = {r["step"] for r in report["rejected_checkpoints"]} - {*damaged}
    assert never_completed <= {whole[0]["step"] + 10}  # the kill may have come while it was being written
    problems = {r["step"]: r["problem"] for r in report["rejected_checkpoints"]}
    for step, word in zip(damaged, ("SHA-256", "truncated", "manifest.json"), strict=True):
        assert word in problems[step]
    resumed = report["generations"][-1]
    assert (resumed["source"], resumed["continuation"]) == ("durable", "bit_exact")
    assert resumed["first_step"] == whole[3]["step"] + 1
    assert report["lost_steps"] == interrupted["steps"] - whole[3]["step"]
    code, listed = alone.checkpoints("killed-driver", "--verify")
    assert code == 0
    kept = [c for c in report["checkpoints"] if not c["removed"]]
    facts = ("step", "uri", "bytes", "sha256")
    assert [[c[fact] for fact in facts] for c in kept] == [[c[fact] for fact in facts] for c in reversed(listed)]
    assert len(kept) == 5


def damage(checkpoint: dict[str, Any], how: Any) -> int:
    """Harm one shard of it; its step."""
    folder = Path(checkpoint["uri"])
    how(folder, sorted(folder.glob("*.safetensors"))[0])
    return int(checkpoint["step"])


def flip_a_bit(_: Path, shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 4
    shard.write_bytes(content)


def truncate(_: Path, shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


def remove_the_manifest(folder: Path, _: Path) -> None:
    (folder / "manifest.json").unlink()
