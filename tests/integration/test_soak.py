"""A short soak: a dozen faults of all kinds in one run, whose losses are those of an undisturbed one. About 2 min."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"


def test_a_dozen_faults_leave_no_trace_in_the_losses(tmp_path: Path) -> None:
    out, svg = tmp_path / "soak.json", tmp_path / "soak.svg"
    done = subprocess.run(
        [sys.executable, str(SOAK), "--faults", "12", "--out", str(out), "--svg", str(svg)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["problems"] == []
    assert result["first_different_loss"] is None
    assert result["same_samples"]
    assert sum(result["struck"].values()) == result["faults"] >= 12
    assert svg.read_text().startswith("<svg")
