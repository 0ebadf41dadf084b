"""What each trial may use of the cluster now: the budget, divided anew when a trial begins or ends, or a node does.

A trial's process reads its part from a file in the sweep's passing folder, once a second, and resizes between two
steps. Who is gone keeps its part for a moment: one that comes back at once, as with PBT, disturbs nobody.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from elastictrain.config import TrainConfig
from elastictrain.plan.layout import legal_world_sizes
from elastictrain.runtime.fleet import demand_of, slots_of
from elastictrain.sweep.share import seat, share
from elastictrain.sweep.space import config_of

LOOK_EVERY_S = 0.5
GONE_S = 3.0
"""How long a trial must be gone for others to take its workers."""


def sizes_of(config: TrainConfig) -> tuple[int, ...]:
    """The numbers of workers that a run of this config can have."""
    train, elastic = config.train, config.elastic
    return legal_world_sizes(
        train.global_batch, train.micro_batch, elastic.min_workers, elastic.max_workers, config.parallel.replica_size
    )


class Shares:
    """Follows which trials are there."""

    def __init__(self, config: TrainConfig, budget: int, scratch: Path) -> None:
        self._config, self._budget, self._scratch = config, budget, scratch
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._seen: dict[str, float] = {}
        """When each trial was there last."""
        self._looked = 0.0
        self._seats: dict[str, dict[str, int]] = {}

    def follow(self, live: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
        """Allot to these trials (their values by name) if it is time; the workers of each where that has changed."""
        now = time.monotonic()
        new = live.keys() - self._seen.keys()
        self._seen |= dict.fromkeys(live, now)
        if not new and now < self._looked + LOOK_EVERY_S:
            return {}
        self._looked = now
        self._seen = {name: at for name, at in self._seen.items() if now < at + GONE_S}
        for name in new:
            self._sizes[name] = sizes_of(config_of(self._config, live[name], name))
        nodes = [node for node in ray.nodes() if node["Alive"]]
        demand = demand_of(self._config, nodes)
        slots = {node["NodeID"]: slots_of(node, demand) for node in nodes}
        shares = share(min(self._budget, sum(slots.values())), {n: self._wanted(n, n in live) for n in self._seen})
        seats = seat(shares, slots, self._seats)
        before, self._seats = self._seats, seats
        for name in (name for name in seats if seats[name] != before.get(name)):
            self._write(name, seats[name])
        return {name: shares[name] for name in live} if seats != before else {}

    def _wanted(self, name: str, is_live: bool) -> tuple[int, ...]:
        """The numbers of workers that a trial may be given; who is gone is given no more than it had."""
        had = sum(self._seats.get(name, {}).values())
        return tuple(n for n in self._sizes[name] if is_live or n <= had)

    def _write(self, name: str, slots: Mapping[str, int]) -> None:
        path = self._scratch / f"{name}.slots"
        new = path.with_suffix(f".new-{os.getpid()}")
        new.write_text(json.dumps(slots))
        new.replace(path)
