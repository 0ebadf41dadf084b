"""A process builds engine after engine, and takes step after step, without growing. About 20 s."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from dataclasses import dataclass

import pytest
from ranks import Rank, num_files, run_team
from torch import nn
from training import micro_batch, train, train_config, workload

from elastictrain.engine.build import build_engine
from elastictrain.engine.release import tidy
from elastictrain.engine.warm import warm

ROUNDS = 14


@dataclass
class Remains:
    """What a process holds after an engine's life."""

    files: int
    threads: int
    resident_mib: int
    masters_freed: bool
    """Before any garbage collection."""
    modules: int
    """Alive after one."""


def rebuild(me: Rank, stage: int, degrees: dict[str, int], offload: str) -> list[Remains]:
    """Build, step and tear down again and again."""
    config = train_config(stage, degrees=degrees, offload=offload)
    warm(workload(config), config, stage, micro_batch(1, 0)[1])
    found = []
    for generation in range(ROUNDS):
        group = me.group(generation, (0, 1))
        group.form()
        gc.disable()
        engine = build_engine(workload(config), config, config.layout(2), group)
        train(engine, config, me.index, 2, [1])
        masters = [weakref.ref(piece.master) for piece in engine._found.pieces]
        engine.close()
        group.close()
        freed = all(ref() is None for ref in masters)
        tidy()
        modules = sum(isinstance(thing, nn.Module) for thing in gc.get_objects())
        found.append(Remains(num_files(), len(os.listdir("/proc/self/task")), resident_mib(), freed, modules))
        gc.enable()
        me.meet()
    return found


def resident_mib() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


@pytest.mark.parametrize(
    ("stage", "degrees", "offload"),
    [
        (1, {}, "none"),
        (3, {}, "none"),
        (1, {"pp": 2}, "none"),
        (1, {"tp": 2}, "none"),
        (3, {"sp": 2}, "none"),
        (2, {"ep": 2}, "none"),
        (3, {}, "nvme"),
    ],
)
def test_rebuilding_is_flat(stage: int, degrees: dict[str, int], offload: str) -> None:
    for rounds in run_team(2, rebuild, stage, degrees, offload):
        settled = rounds[3:]
        # The other rank's connections to my store close in their own time: at most two a generation.
        files = [remains.files for remains in settled]
        assert max(files) - min(files) <= 4 < len(settled), "a leak of one a round would show"
        assert len({remains.threads for remains in settled}) == 1
        assert settled[-1].resident_mib - settled[0].resident_mib < 20
        assert all(remains.masters_freed for remains in rounds), "an engine's memory waits for the garbage collector"
        assert len({remains.modules for remains in settled}) == 1


def step_on(me: Rank, stage: int, degrees: dict[str, int]) -> int:
    """Blocks of Python's memory that a hundred steps leave behind, each of up to 512 bytes."""
    config = train_config(stage, degrees=degrees)
    group = me.group(0, (0, 1))
    group.form()
    engine = build_engine(workload(config), config, config.layout(2), group)
    train(engine, config, me.index, 2, range(1, 11))
    gc.collect()
    before = sys.getallocatedblocks()
    train(engine, config, me.index, 2, range(11, 111))
    gc.collect()
    left = sys.getallocatedblocks() - before
    me.meet()
    engine.close()
    group.close()
    return left


@pytest.mark.parametrize(("stage", "degrees"), [(1, {}), (3, {}), (1, {"pp": 2})])
def test_steps_leave_nothing_behind(stage: int, degrees: dict[str, int]) -> None:
    for left in run_team(2, step_on, stage, degrees):
        assert left < 100 * 10, "more is gigabytes in a million steps"
