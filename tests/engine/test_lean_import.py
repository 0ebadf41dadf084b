"""What a worker's process does not import, since it takes seconds and memory and nobody there uses it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

STEPS = """
import sys
sys.path.insert(0, {here!r})
import torch
from training import train_config, workload
from elastictrain.engine.warm import warm

before = torch.compile
config = train_config(1)
warm(workload(config), config, 1, {{"tokens": torch.zeros((1, 17), dtype=torch.long)}})
assert torch.compile is before
print([name for name in ("mlflow", "pandas", "torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
import mlflow  # whoever wants it has it, and it tells nobody
from torch.optim import Adam
weight = torch.nn.Parameter(torch.ones(2))
weight.grad = torch.ones(2)
Adam([weight], lr=0.5).step()
print([round(value, 3) for value in weight.tolist()])
"""


def test_a_warm_process_has_imported_neither_compilers_nor_mlflow(tmp_path: Path) -> None:
    here = __file__.rpartition("/")[0]
    code = STEPS.format(here=here)
    environment = {name: value for name, value in os.environ.items() if name not in ("DO_NOT_TRACK", "CI")}
    environment["XDG_CONFIG_HOME"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert list(tmp_path.iterdir()) == []
    assert done.returncode == 0, done.stderr
    imported, weight = done.stdout.splitlines()[-2:]
    assert imported == "[]"
    assert weight == "[0.5, 0.5]"
