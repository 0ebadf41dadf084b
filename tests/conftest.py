"""What tests of several rooms share."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None)
"""No test asserts seconds: a busy machine would fail it."""
settings.load_profile("suite")
settings.register_profile("dozens", deadline=None)
"""For tests that have more cases than a suite has time for: see tests/integration/test_run_random.py."""

# Ray reads this once, when the first test module imports it: clusters that tests start themselves have no token. A run
# that embeds its own cluster is another process, and makes one.
os.environ["RAY_AUTH_MODE"] = "disabled"

# Every process of a test inherits these, and there are hundreds. Models are tiny: a second thread only waits for the
# first, at the price of the core that another process could have. And what torch and pydantic would look for in the
# metadata of every installed package is not there.
os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYDANTIC_DISABLE_PLUGINS": "__all__"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a filesystem of the size that it is given, as `mount` takes it; skips where this user may not mount one."""
    mounted: list[Path] = []

    def make(size: str) -> Path:
        folder = tmp_path / f"disk-{size}"
        folder.mkdir()
        try:
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False, capture_output=True
            )
        except FileNotFoundError:
            pytest.skip("there is no `mount` command")
        if done.returncode:
            pytest.skip(f"may not mount a tmpfs: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def tiny_disk(disk: Callable[[str], Path]) -> Path:
    """A filesystem of 512 KiB."""
    return disk("512k")
