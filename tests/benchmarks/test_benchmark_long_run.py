"""The journal that long_run.py writes is one that the report understands."""

from __future__ import annotations

import long_run

from elastictrain.tracking.report import build_report


def test_the_long_run_is_a_run() -> None:
    report = build_report([*long_run.events(10_100)])
    assert (report["steps"], len(report["failures"]), report["lost_steps"]) == (10_100, 2, 0)
    assert [failure["recovered_s"] is not None for failure in report["failures"]] == [True, True]
    assert len(report["checkpoints"]) == 10


def test_every_part_is_measured() -> None:
    found = long_run.measure(300)
    assert found["parts"].keys() == long_run.PARTS.keys()
    assert "300 steps" in long_run.told(found)
