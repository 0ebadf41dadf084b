"""Shell completion, asked as bash asks: by the environment, of the console script's own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-c", "from elastictrain.cli import main; main()"]


def offered(line: str, folder: Path) -> list[str]:
    asked = {
        "_ELASTICTRAIN_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
    }
    done = subprocess.run(
        COMMAND, env=os.environ | asked, cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name in ("quickstart", "quick-second", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").touch()
    (tmp_path / "runs" / "_data").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("elastictrain che", ["checkpoints"]),
        ("elastictrain report --ht", ["--html"]),
        ("elastictrain report quick", ["quick-second", "quickstart"]),
        ("elastictrain top ", ["other", "quick-second", "quickstart"]),
        ("elastictrain status --storage s3://bucket/runs qu", []),
    ],
)
def test_bash_is_offered(line: str, offers: list[str], runs: Path) -> None:
    assert offered(line, runs) == offers


def test_the_script_that_bash_sources_asks_in_the_same_way() -> None:
    done = subprocess.run(
        [*COMMAND, "--show-completion", "bash"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert "_ELASTICTRAIN_COMPLETE=complete_bash" in done.stdout
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0
