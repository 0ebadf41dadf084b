"""What tests of several rooms share."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("dozens")
"""For tests that have more cases than a suite has time for: see tests/integration/test_run_random.py."""

# Ray reads this once, when the first test module imports it: clusters that tests start themselves have no token. A run
# that embeds its own cluster is another process, and makes one.
os.environ["RAY_AUTH_MODE"] = "disabled"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 512 KiB; skips where this user may not mount one."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
