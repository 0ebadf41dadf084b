"""A process builds engine after engine without growing, and frees each without the garbage collector. About 15 s."""

from __future__ import annotations

import gc
import os
import weakref

import pytest
from ranks import Rank, num_files, run_team
from training import micro_batch, train, train_config, workload

from elastictrain.engine.release import tidy
from elastictrain.engine.warm import warm
from elastictrain.engine.zero import build_engine

ROUNDS = 14


def rebuild(me: Rank, stage: int) -> list[tuple[int, int, int, bool]]:
    """Files, threads, resident MiB and whether the masters are gone, after each engine's life."""
    config = train_config(stage)
    warm(workload(config), config, micro_batch(1, 0)[1])
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
        found.append((num_files(), len(os.listdir("/proc/self/task")), resident_mib(), freed))
        tidy()
        gc.enable()
        me.meet()
    return found


def resident_mib() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


@pytest.mark.parametrize("stage", [1, 3])
def test_rebuilding_is_flat(stage: int) -> None:
    for rounds in run_team(2, rebuild, stage):
        settled = rounds[3:]
        # The other rank's connections to my store close in their own time: at most two a generation.
        files = [files for files, *_ in settled]
        assert max(files) - min(files) <= 4 < len(settled), "a leak of one a round would show"
        assert {threads for _, threads, *_ in settled} == {rounds[2][1]}
        assert settled[-1][2] - settled[0][2] < 20, f"resident MiB: {[mib for _, _, mib, _ in rounds]}"
        assert all(freed for *_, freed in rounds), "an engine's memory waits for the garbage collector"
