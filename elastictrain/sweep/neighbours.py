"""Sweeps on one cluster that know of each other: each says what it could use and holds, and is told what it may use.

What ordinary runs hold and wait for is read from the names of their slots: they need not know of sweeps.

They meet at a named actor of the cluster, which takes no CPU, is started by the first of them and ends a minute after
the last. It decides by `share.grant`, one sweep at a time. A sweep that has not been heard of for ten seconds is gone.
Without the actor, or while it starts again, each goes on with what it was granted last; should two then want the same
slot, Ray lets one of them wait for it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import placement_group_table

from elastictrain.sweep.share import Claim, grant
from elastictrain.sweep.taken import taken_by_others

NAMESPACE = "elastictrain/sweeps"
GONE_S = 10.0
ALONE_S = 60.0
"""How long the actor waits for another sweep."""
ANSWER_S = 10.0


class Table:
    """The actor."""

    def __init__(self) -> None:
        self._claims: dict[str, Claim] = {}
        """In the order in which the sweeps came."""
        self._heard: dict[str, float] = {}
        self._spoken = time.monotonic()
        threading.Thread(target=self._end_when_alone, name="alone", daemon=True).start()

    def renew(self, name: str, claim: Claim) -> tuple[dict[str, int], list[str]]:
        """The slots by node that this sweep may use; and who else uses the cluster, or could, in words."""
        now = self._spoken = time.monotonic()
        self._heard[name] = now
        for gone in [other for other, at in self._heard.items() if now > at + GONE_S]:
            self.leave(gone)
        self._claims[name] = claim
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        taken = taken_by_others(placement_group_table().values(), nodes)
        granted = grant(self._claims, name, nodes, taken)
        both = claim.held.keys() | granted.keys()
        held = {node: max(claim.held.get(node, 0), granted.get(node, 0)) for node in both}
        self._claims[name] = replace(claim, held=held)
        runs = {of.run for of in taken}
        sweeps = [o.rstrip("/").rpartition("/")[2] for o, c in self._claims.items() if o != name and c.workers]
        return granted, [*sorted(runs), *(f"sweep {sweep}" for sweep in sorted(sweeps))]

    def leave(self, name: str) -> None:
        """This sweep is over."""
        self._claims.pop(name, None)
        self._heard.pop(name, None)

    def _end_when_alone(self) -> None:
        while time.monotonic() < self._spoken + ALONE_S:
            time.sleep(1.0)
        os._exit(0)  # nobody needs what it knows


class Neighbours:
    """Who else uses the cluster, as one sweep sees it."""

    def __init__(self, name: str, tell: Callable[[str], None]) -> None:
        """`name` is the sweep's, unlike any other's on the cluster: its URI. `tell` hears of neighbours that matter."""
        self._name, self._tell = name, tell
        self._table: Any = None
        self._granted: dict[str, int] = {}
        self._told = ""

    def granted(self, claim: Claim) -> dict[str, int]:
        """Slots by node that the sweep may use now; those of last time where nobody answers."""
        try:
            if self._table is None:
                self._table = _table()
            self._granted, others = ray.get(self._table.renew.remote(self._name, claim), timeout=ANSWER_S)
        except RayError:
            self._table = None
            return self._granted
        self._say(claim, others)
        return self._granted

    def leave(self) -> None:
        """Give all of it back."""
        with suppress(RayError):
            if self._table is not None:
                ray.get(self._table.leave.remote(self._name), timeout=ANSWER_S)

    def _say(self, claim: Claim, others: Sequence[str]) -> None:
        number = sum(self._granted.values())
        if not claim.workers:
            return
        told = f"the cluster is shared with {', '.join(others)}: {number} of {claim.workers} workers" if others else ""
        if number < claim.fewest and others:
            told += f"; a trial needs {claim.fewest}, and waits for them"
        if told != self._told:
            self._told = told
            self._tell(told or "the cluster is shared with nobody any more")


def _table() -> Any:
    actor = ray.remote(num_cpus=0, max_restarts=0)(Table)
    options = {"name": "table", "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    return actor.options(**options).remote()
