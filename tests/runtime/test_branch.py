"""A run that begins with a checkpoint of another one: what can't be is said at once, and what is done is done once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from elastictrain.checkpoint.of_run import checkpoints_of
from elastictrain.config import TrainConfig
from elastictrain.errors import ConfigError
from elastictrain.events import CheckpointWritten, Event
from elastictrain.runtime.branch import branch, check_branch
from elastictrain.state.manifest import Manifest
from elastictrain.state.tensors import Fragment, LogicalTensor, ShardIndex
from elastictrain.tracking.family import Family

STEP, GLOBAL_BATCH = 40, 8


def config(folder: Path, name: str, start_from: str | None = None, **train: int) -> TrainConfig:
    run = {"name": name, "storage": str(folder), "start_from": start_from}
    return TrainConfig.from_dict({"run": run, "train": {"global_batch": GLOBAL_BATCH} | train})


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A storage in which run `old` has a checkpoint of step 40."""
    store = checkpoints_of(config(tmp_path, "old"))
    index = ShardIndex((Fragment("param/a", 0, 6),))
    shard = store.write_shard(STEP, 0, 1, index, np.arange(6, dtype=np.float32).tobytes())
    tensors = (LogicalTensor("param/a", (6,)),)
    chain = hashlib.sha256().hexdigest()
    scalars = {"optimizer_step": STEP}
    layout = {"dp": 1, "zero_stage": 1, "micro_batch": 4, "accumulation": 2}
    manifest = Manifest("old", STEP, STEP * GLOBAL_BATCH, chain, 2.5, layout, scalars, tensors, (shard,), 1e9)
    store.commit(manifest)
    return tmp_path


def test_the_copy_is_the_run_s_first_checkpoint_and_its_parent_is_told(trained: Path) -> None:
    new = config(trained, "new", "old@40")
    told: list[Event] = []
    branch(new, checkpoints_of(new), told, told.append)
    branch(new, checkpoints_of(new), told, told.append)
    [written] = told
    assert isinstance(written, CheckpointWritten)
    assert (written.step, written.samples, written.loss) == (STEP, STEP * GLOBAL_BATCH, 2.5)
    assert written.origin == checkpoints_of(config(trained, "old")).uri(STEP)
    assert Family(told).members[written.uri].parent == written.origin
    assert checkpoints_of(new).verify(STEP, written.sha256).manifest.run == "new"


def begin(wanted: TrainConfig) -> None:
    check_branch(wanted)
    branch(wanted, checkpoints_of(wanted), [], lambda event: None)


@pytest.mark.parametrize(
    ("name", "start_from", "train", "message"),
    [
        ("old", "old@40", {}, "is of the run itself"),
        ("new", "old@40", {"steps": 40}, "has all of train.steps 40 behind it: set train.steps to more than 40"),
        ("new", "old@7", {}, "there is no such checkpoint in .*; run old has old@40"),
        ("new", "odl@40", {}, "run odl has none"),
        ("new", "old@40", {"global_batch": 16}, "has used 320 samples in 40 steps, which is not train.global_batch 16"),
    ],
)
def test_what_can_not_be_is_said(
    trained: Path, name: str, start_from: str, train: dict[str, int], message: str
) -> None:
    wanted = config(trained, name, start_from, **train)
    with pytest.raises(ConfigError, match=message):
        begin(wanted)


def test_it_is_written_run_at_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.start_from"):
        config(tmp_path, "new", "old/checkpoints/40")
