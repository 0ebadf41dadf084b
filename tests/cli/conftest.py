"""A storage with one run in it."""

from pathlib import Path

import pytest
from kept_run import KeptRun


@pytest.fixture
def kept(tmp_path: Path) -> KeptRun:
    run = KeptRun(tmp_path / "runs")
    run.killed_and_recovered()
    return run
