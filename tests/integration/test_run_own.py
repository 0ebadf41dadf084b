"""A model and samples of the user's own: the example of the docs survives a kill bit for bit, and gives its weights.

About 15 s on two cores: both runs at once, on the shared cluster.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from product import Product, assert_recorded, assert_same_training
from safetensors.torch import load_file

from elastictrain import TrainConfig
from elastictrain.data.samples import named_samples
from elastictrain.workloads import build_workload

DIGITS = Path(__file__).parents[2] / "docs" / "examples" / "digits.py"


EXITS = """

class Exits(Digits):
    def loss(self, module, batch):
        if pathlib.Path(__file__).with_name("now").exists():
            sys.exit(9)
        return super().loss(module, batch)
"""


def test_digits_survive_a_kill_and_are_read(product: Product, tmp_path: Path) -> None:
    code = shutil.copy(DIGITS, tmp_path)
    named = (f"model={{kind: own, workload: '{code}:Digits'}}", f"data.samples={code}:samples")
    own = (*named, "data.validation_samples=225", "train.steps=120", "train.learning_rate=1e-2")
    kill = "faults=[{at: 60, rank: 1, kind: kill}]"
    calm, struck = product.begin("digits-calm", *own), product.begin("digits-struck", *own, kill)
    for running in (calm, struck):
        ended = running.end()
        assert ended.code == 0, ended.err
        assert "bits per byte" not in ended.out
    reports = {name: product.report(name) for name in ("digits-calm", "digits-struck")}
    assert_same_training(reports["digits-struck"], reports["digits-calm"])
    [failure] = reports["digits-struck"]["failures"]
    assert (failure["source"], failure["continuation"]) == ("memory", "bit_exact")
    assert reports["digits-struck"]["data"]["num_samples"] == 1572
    assert_recorded(product.storage, reports["digits-struck"])

    folder = tmp_path / "digits"
    exported = product.ask("export", "digits-struck", "--to", str(folder))
    assert exported.code == 0, exported.err
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    config = TrainConfig.load(None, named)
    workload, held_out = build_workload(config, 0), named_samples(config, "validation")
    module = workload.build(0)
    module.load_state_dict(load_file(folder / "model.safetensors"))
    batch = held_out.read(range(len(held_out)))
    nats, count = workload.evaluate(module, batch)
    assert reports["digits-struck"]["evaluation"]["loss"] == pytest.approx(nats / count, rel=1e-4)
    with torch.no_grad():
        right = module.eval()(batch["image"]).argmax(1) == batch["digit"]
    assert right.float().mean() > 0.8

    Path(code).write_text(DIGITS.read_text().replace("% 8 == 0", "% 9 == 0"))
    other = product.train("digits-calm", *own, "train.steps=130")
    assert other.code == 3
    assert "1,597 and 200 held out, and it was 1,572 and 225" in other.err


def test_code_that_exits_is_told_and_not_tried_for_ever(product: Product, tmp_path: Path) -> None:
    code = tmp_path / "exits.py"
    code.write_text("import pathlib\nimport sys\n\n" + DIGITS.read_text() + EXITS)
    named = (f"model={{kind: own, workload: '{code}:Exits'}}", f"data.samples={code}:samples")
    running = product.begin("exits", *named, "data.validation_samples=225", "train.steps=100000")
    running.until_running(0)
    running.until("some steps", lambda: (s := running.status()) and s.step > 3)
    (tmp_path / "now").touch()
    ended = running.end()
    assert ended.code == 4
    report = product.report("exits")
    assert {f["kind"] for f in report["failures"]} == {"user_error"}
    assert "the model's code called sys.exit(9)" in report["failures"][0]["cause"]["message"]
    assert "in loss" in report["failures"][0]["cause"]["traceback"]
    assert len(report["failures"]) <= 4  # of each rank once or twice
