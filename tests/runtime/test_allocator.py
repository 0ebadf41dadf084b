"""Memory that a step has used is there for the next one: in a process of its own, since it can't be undone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from elastictrain.runtime.allocator import keep_memory
import numpy as np

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        np.ones(40 << 20, np.uint8)  # 10,240 pages, and more than malloc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before, taken, _ = faults(), keep_memory(), faults()
print(before, taken, faults())
"""


@pytest.mark.parametrize("tunables", ["", "glibc.malloc.tcache_count=7"])
def test_buffers_are_kept_unless_the_environment_says_otherwise(tunables: str) -> None:
    environment = os.environ | {"GLIBC_TUNABLES": tunables, "NUMPY_MADVISE_HUGEPAGE": "0"}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    before, taken, after = done.stdout.split()
    assert taken == str(not tunables)
    assert int(before) > 10_240
    assert (int(after) < 100) == (not tunables)
