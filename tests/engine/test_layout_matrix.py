"""Every layout that four ranks can have, in a random order: the state goes on bit for bit, in memory and in storage.

Real groups and engines, built and torn down in the same four processes; a step is taken in each layout, so that weights
and moments all change. The order, the dtypes, where ZeRO keeps its shares and the ways are drawn anew each time from a
seed that a failure tells; of a model with experts also which twelve layouts. About 40 s.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import Rank, run_team
from training import FolderSource, logical_shapes, save_shard, train, train_config, workload

from elastictrain.checkpoint.store import CheckpointStore
from elastictrain.config import TrainConfig
from elastictrain.engine.build import build_engine
from elastictrain.engine.zero import ZeroEngine
from elastictrain.plan.layout import Layout
from elastictrain.plan.space import OFFLOADS
from elastictrain.state.manifest import Manifest
from elastictrain.storage import Storage

NUM_RANKS = 4
NUM_LAYERS = 4


@dataclass(frozen=True)
class Stop:
    """One generation of the journey."""

    layout: Layout
    dtype: str
    members: tuple[int, ...]
    durable: bool
    """Whether its state comes from storage."""

    @property
    def config(self) -> TrainConfig:
        layout = self.layout
        if replace(layout, offload="none") in LAYOUTS_OF_EXPERTS:
            degrees = {"pp": layout.pp, "tp": layout.tp, "ep": layout.ep}
            return train_config(
                layout.zero_stage,
                self.dtype,
                degrees=degrees,
                num_layers=NUM_LAYERS,
                offload=layout.offload,
                global_batch=8,
            )
        degrees = {"pp": layout.pp, "tp": layout.tp, "sp": layout.sp}
        return train_config(
            layout.zero_stage, self.dtype, degrees=degrees, num_layers=NUM_LAYERS, offload=layout.offload
        )


LAYOUTS = [
    Layout(dp, stage, 2, 6 // dp, pp, tp, sp)
    for pp, tp, sp in [*product((1, 2, 4), (1, 2), (1, 2)), (1, 1, 4)]
    for dp in (1, 2, 3)
    for stage in (range(4) if pp == 1 else range(2))
    if pp * tp * sp * dp <= NUM_RANKS
]
LAYOUTS_OF_EXPERTS = [
    Layout(dp, stage, 2, 4 // dp, pp, tp, ep=ep)
    for pp, tp, dp, ep in product((1, 2, 4), (1, 2), (1, 2, 4), (1, 2, 4))
    for stage in (range(2) if pp > 1 else range(3) if ep > 1 else range(4))
    if dp % ep == 0 and pp * tp * dp <= NUM_RANKS
]


def random_journey(seed: int, layouts: list[Layout], num_stops: int) -> list[Stop]:
    chance = random.Random(seed)

    def placed(layout: Layout) -> Layout:
        """With what ZeRO shards anywhere that it can lie."""
        return replace(layout, offload=chance.choice(OFFLOADS)) if layout.zero_stage else layout

    return [
        Stop(
            placed(layout),
            chance.choice(["fp32", "bf16"] if layout.tp * layout.ep == 1 or layout.zero_stage else ["fp32"]),
            tuple(chance.sample(range(NUM_RANKS), layout.world_size)),
            chance.random() < 0.5,
        )
        for layout in chance.sample(layouts, num_stops)
    ]


def travel(me: Rank, folder: Path, journey: list[Stop]) -> None:
    """Import, export what was imported, take a step, export, in each layout."""
    store = CheckpointStore(Storage.open(str(folder / "storage")))
    for number, stop in enumerate(journey):
        if me.index in stop.members:
            config, rank = stop.config, stop.members.index(me.index)
            group = me.group(number, stop.members)
            group.form()
            assert config.layout(len(stop.members)) == stop.layout
            engine = build_engine(workload(config), config, stop.layout, group, loads_next=number > 0)
            if number:
                before = folder / f"after{number - 1}"
                engine.import_state(store.open(number) if stop.durable else FolderSource(before))
                save_shard(engine, folder / f"imported{number}", rank)
            train(engine, config, rank, len(stop.members), [number + 1])
            save_shard(engine, folder / f"after{number}", rank)
            write_durably(engine, store, number + 1, rank, len(stop.members))
            engine.close()
            group.close()
        me.meet()


def write_durably(engine: ZeroEngine, store: CheckpointStore, step: int, rank: int, world_size: int) -> None:
    index = engine.shard_index()
    buffer = memoryview(bytearray(index.num_bytes))
    engine.export_into(buffer)
    entries: list[Any] = [None] * world_size
    dist.all_gather_object(entries, store.write_shard(step, rank, world_size, index, buffer))
    if rank == 0:
        scalars = dict(engine.scalars())
        store.commit(Manifest("m", step, step, "00" * 32, 1.0, {}, scalars, engine.tensors(), tuple(entries), 0.0))


@pytest.mark.parametrize(
    ("layouts", "num_stops"), [(LAYOUTS, len(LAYOUTS)), (LAYOUTS_OF_EXPERTS, 12)], ids=["dense", "experts"]
)
def test_any_layout_to_any_other(tmp_path: Path, layouts: list[Layout], num_stops: int) -> None:
    seed = random.SystemRandom().randrange(2**32)
    journey = random_journey(seed, layouts, num_stops)
    run_team(NUM_RANKS, travel, tmp_path, journey)
    shapes = logical_shapes(journey[0].config)
    for number in range(1, len(journey)):
        told = f"seed {seed}, {journey[number - 1]} to {journey[number]}"
        stored = FolderSource(tmp_path / f"after{number - 1}")
        loaded = FolderSource(tmp_path / f"imported{number}")
        assert stored.scalars == loaded.scalars == {"optimizer_step": number}, told
        values = loaded.tensors(shapes)
        for name, value in stored.tensors(shapes).items():
            assert (value.view("int32") == values[name].view("int32")).all(), f"{name} changed: {told}"
