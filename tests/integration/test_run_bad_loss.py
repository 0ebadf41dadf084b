"""Bad numbers in real runs: a NaN on one rank is skipped by all, stops the run, or takes it back to a checkpoint.

About 100 s on two cores.
"""

from __future__ import annotations

import json
import math

from product import GLOBAL_BATCH, Product, Report, assert_same_training

EVERY_10 = "checkpoint.every=10"
LONG = ("train.steps=300", EVERY_10)
SPIKES = ("train.on_spike=skip", "train.spike_threshold=1", "train.max_bad_steps=64")
"""So low that some steps of a calm run are above it."""


def faults(*plan: dict[str, object]) -> str:
    return f"faults={json.dumps(plan)}"


def nan(at: int, rank: int = 1, repeat: bool = False) -> dict[str, object]:
    return {"at": at, "rank": rank, "kind": "nan", "repeat": repeat}


def finite(report: Report) -> dict[int, float]:
    return {step: loss for step, loss in report["loss"] if loss != "NaN"}


def test_skipped_steps_are_told_and_survive_a_kill_and_a_resume(product: Product) -> None:
    """A killed worker and a stop later the verdicts and losses are those of a run that did nothing but skip."""
    plain = product.train("skipped", *LONG, *SPIKES, faults(nan(10), nan(60, rank=0)))
    assert plain.code == 0, plain.err
    assert "step 10  skipped: loss nan" in plain.out
    report = product.report("skipped")
    assert (report["status"], report["failures"]) == ("complete", [])
    keys = ("step", "first_step", "reason", "limit", "first_sample", "num_samples")
    bad = [skip for skip in report["skipped_steps"] if skip["reason"] != "spike"]
    spikes = [skip for skip in report["skipped_steps"] if skip["reason"] == "spike"]
    assert spikes
    assert all(math.isfinite(skip["loss"]) and skip["loss"] > skip["limit"] for skip in spikes)
    assert [tuple(skip[key] for key in keys) for skip in bad] == [
        (step, step, "loss", None, (step - 1) * GLOBAL_BATCH, GLOBAL_BATCH) for step in (10, 60)
    ]
    assert finite(report).keys() == set(range(1, report["steps"] + 1)) - {10, 60}
    assert [(f["kind"], f["step"], f["rank"]) for f in report["faults_injected"]] == [("nan", 10, 1), ("nan", 60, 0)]

    plan = faults(nan(10, repeat=True), nan(60, rank=0, repeat=True), {"at": 86, "rank": 0, "kind": "kill"})
    running = product.begin("disturbed", *LONG, *SPIKES, plan)
    running.until_step(100)
    stopped = running.stop()
    assert stopped.code == 130, stopped.err
    resumed = product.train("disturbed", *LONG, *SPIKES, plan)
    assert resumed.code == 0, resumed.err
    again = product.report("disturbed")
    assert len(again["failures"]) == 1
    assert_same_training(again, report)
    timeless = [{**skip, "at_s": 0} for skip in again["skipped_steps"]]
    assert timeless == [{**skip, "at_s": 0} for skip in report["skipped_steps"]]


def test_a_stop_keeps_the_state_and_another_policy_goes_on(product: Product) -> None:
    plan = faults(nan(12, repeat=True))
    ended = product.train("stopped-by-nan", "train.steps=20", "train.on_bad_loss=stop", plan)
    assert ended.code == 4
    for text in ("the loss of step 12 is nan", "train.on_bad_loss: stop", "train.on_bad_loss=skip"):
        assert text in ended.err
    assert "Traceback" not in ended.err
    report = product.report("stopped-by-nan")
    assert (report["status"], report["steps"], report["skipped_steps"]) == ("failed", 11, [])
    assert [failure["cause"]["kind"] for failure in report["failures"]] == ["bad_loss"]
    code, [newest] = product.checkpoints("stopped-by-nan", "--verify")
    assert (code, newest["step"], newest["verified"]) == (0, 11, True)

    again = product.train("stopped-by-nan", "train.steps=20", "train.on_bad_loss=skip", plan)
    assert again.code == 0, again.err
    report = product.report("stopped-by-nan")
    assert (report["status"], report["steps"], report["lost_steps"]) == ("complete", 20, 0)
    assert [skip["step"] for skip in report["skipped_steps"]] == [12]


def test_a_rollback_goes_on_from_the_checkpoint_with_other_samples(product: Product) -> None:
    short = ("train.steps=30", EVERY_10)
    ended = product.train("rolled-back", *short, "train.on_bad_loss=rollback", faults(nan(17)))
    assert ended.code == 0, ended.err
    assert "step 17  skipped: loss nan; back to the state after step 10" in ended.out
    report = product.report("rolled-back")
    [skip] = report["skipped_steps"]
    assert (skip["step"], skip["first_step"]) == (17, 11)
    assert (skip["first_sample"], skip["num_samples"]) == (10 * GLOBAL_BATCH, 7 * GLOBAL_BATCH)

    # as if steps 11 to 17 had never had an effect
    ended = product.train("never-trained", *short, faults(*map(nan, range(11, 18))))
    assert ended.code == 0, ended.err
    expected, found = finite(product.report("never-trained")), finite(report)
    assert expected.keys() == {*range(1, 11), *range(18, 31)}
    assert {step: found[step] for step in expected} == expected
