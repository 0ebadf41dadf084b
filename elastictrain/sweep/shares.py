"""What each trial may use of the cluster now: the budget, divided anew when a trial begins or ends, or a node does.

Where other sweeps use the cluster too, the budget is what `neighbours` grants of it.

A trial's process reads its part from a file in the sweep's passing folder, once a second, and resizes between two
steps. Who is gone keeps its part for a moment: one that comes back at once, as with PBT, disturbs nobody.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from elastictrain.config import TrainConfig
from elastictrain.planning import asked_of
from elastictrain.runtime.fleet import demand_of
from elastictrain.sweep.neighbours import Neighbours
from elastictrain.sweep.share import Claim, seat, share
from elastictrain.sweep.space import config_of

LOOK_EVERY_S = 0.5
GONE_S = 3.0
"""How long a trial must be gone for others to take its workers."""


def sizes_of(config: TrainConfig) -> tuple[int, ...]:
    """The numbers of workers that a run of this config can have."""
    return asked_of(config).world_sizes(config.elastic.min_workers, config.elastic.max_workers)


class Shares:
    """Follows which trials are there."""

    def __init__(self, config: TrainConfig, budget: int, scratch: Path, neighbours: Neighbours) -> None:
        self._config, self._budget, self._scratch, self._neighbours = config, budget, scratch, neighbours
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
        wanted = {name: self._wanted(name, name in live) for name in self._seen}
        slots = self._neighbours.granted(self._claim(wanted))
        shares = share(sum(slots.values()), wanted)
        seats = seat(shares, slots, self._seats)
        before, self._seats = self._seats, seats
        for name in (name for name in seats if seats[name] != before.get(name)):
            self._write(name, seats[name])
        return {name: shares[name] for name in live} if seats != before else {}

    def _claim(self, wanted: Mapping[str, Sequence[int]]) -> Claim:
        legal = [sizes for sizes in wanted.values() if sizes]
        workers = min(self._budget, sum(max(sizes) for sizes in legal))
        held: Counter[str] = Counter()
        for seats in self._seats.values():
            held.update(seats)
        demand = demand_of(self._config, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        return Claim(workers, min((sizes[0] for sizes in legal), default=0), demand, dict(held))

    def _wanted(self, name: str, is_live: bool) -> tuple[int, ...]:
        """The numbers of workers that a trial may be given; who is gone is given no more than it had."""
        had = sum(self._seats.get(name, {}).values())
        return tuple(n for n in self._sizes[name] if is_live or n <= had)

    def _write(self, name: str, slots: Mapping[str, int]) -> None:
        path = self._scratch / f"{name}.slots"
        new = path.with_suffix(f".new-{os.getpid()}")
        new.write_text(json.dumps(slots))
        new.replace(path)
