"""A process SIGKILLed at every point where it touches the disk: there is always a verified checkpoint, the newest one.

Each case forks from a warm server process, runs `write_next` until its n-th fsync or rename, and dies there.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from elastictrain.checkpoint.store import CheckpointStore
from elastictrain.state.manifest import Manifest
from elastictrain.state.tensors import Fragment, LogicalTensor, ShardIndex
from elastictrain.storage import Storage

NUMEL = 4096
HALVES = [ShardIndex((Fragment("param/w", rank * NUMEL // 2, NUMEL // 2),)) for rank in range(2)]


def write_next(folder: str, step: int) -> None:
    """What the runtime does for a checkpoint: both shards, the manifest, and away with the old ones."""
    store = CheckpointStore(Storage.open(folder))
    data = np.full(NUMEL, step, np.float32).tobytes()
    halves = (data[: 2 * NUMEL], data[2 * NUMEL :])
    shards = tuple(store.write_shard(step, r, 2, HALVES[r], halves[r]) for r in range(2))
    tensors = (LogicalTensor("param/w", (NUMEL,)),)
    store.commit(Manifest("demo", step, step, "", 1.0, {}, {"optimizer_step": step}, tensors, shards, 1e9))
    store.prune(1)


def killed_at(folder: str, step: int, nth: int) -> None:
    calls = 0

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)

        return counted

    for name in ("fsync", "replace", "open"):
        setattr(os, name, dying(getattr(os, name)))
    write_next(folder, step)


def test_killed_anywhere(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["elastictrain.checkpoint.store"])
    survived: list[int] = []
    for nth in range(1, 200):
        folder = tmp_path / str(nth)
        write_next(str(folder), 10)
        writer = context.Process(target=killed_at, args=(str(folder), 20, nth))
        writer.start()
        writer.join()
        store = CheckpointStore(Storage.open(str(folder)))
        newest = store.newest_verified({}, lambda step, *_: survived.append(-step), lambda found: "")
        assert newest is not None
        survived.append(newest.step)
        assert [store.verify(found.step).step for found in store.list()] in ([10], [20], [20, 10])
        values = np.zeros(NUMEL, np.float32)
        store.open(newest.step).fill([(Fragment("param/w", 0, NUMEL), memoryview(values))])
        assert (values == newest.step).all()

        write_next(str(folder), 20)  # The next attempt is not hindered, and leaves nothing of the first behind.
        write_next(str(folder), 30)
        files = {path.name for path in folder.rglob("*") if path.is_file()}
        assert files == {"manifest.json"} | {f"shard-0000{r}-of-00002.safetensors" for r in range(2)}
        if writer.exitcode == 0:
            break
        assert writer.exitcode == -signal.SIGKILL
    assert writer.exitcode == 0, "the loop saw every point"
    assert {10, 20, -20} <= set(survived)
    assert len(survived) > 15
