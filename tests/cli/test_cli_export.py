"""`elastictrain export` of a model of the user's own: its weights, and nothing of the code that a storage names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from kept_run import KeptRun, told
from safetensors.numpy import load_file


def test_code_that_a_storage_names_does_not_run(kept: KeptRun, tmp_path: Path) -> None:
    kept.completed()
    trap = tmp_path / "trap.py"
    trap.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'sprung')!r}).touch()\n")
    config = kept.config.to_dict()
    config["model"] |= {"kind": "own", "workload": f"{trap}:Model"}
    config["data"]["samples"] = f"{trap}:samples"
    (kept.folder / "config.json").write_text(json.dumps(config))
    for command in (["export", kept.name, "--to", tmp_path / "out"], ["report", kept.name], ["lineage", kept.name]):
        told(kept, *command)
    told(kept, "checkpoints", kept.name, "--verify")
    assert not (tmp_path / "sprung").exists()
    [file] = (tmp_path / "out").iterdir()
    assert file.name == "model.safetensors"
    assert np.array_equal(load_file(file)["weight"], np.arange(4, 12, dtype=np.float32))
