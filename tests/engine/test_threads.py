"""How many threads a worker computes with: in a process of its own, since its environment decides."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LOOK = """
import os
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as Ray does for an actor without CPUs
import torch
from elastictrain.engine.device import use_threads
use_threads(2.5)
print(torch.get_num_threads())
"""


@pytest.mark.parametrize(("started_with", "threads"), [(None, 2), ("1", 1)])
def test_a_standby_computes_as_those_whose_rank_it_takes(started_with: str | None, threads: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": started_with} if started_with else {}
    done = subprocess.run([sys.executable, "-c", LOOK], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == threads
