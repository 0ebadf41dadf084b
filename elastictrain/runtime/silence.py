"""Keepers that say nothing any more: cut off with their node, stopped, or stuck.

None of these breaks a connection, so Ray tells nothing. Each keeper is asked all the time where its ranks are; one that
does not answer has its node asked whether it is there (`probe`), and a worker beside it whether the keeper's process is
stopped: those two are certain, and known in seconds. What only takes long is given much longer.

Cost: linear in the nodes a look; messages only about those that are silent.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from elastictrain.events import Cause
from elastictrain.runtime.fleet import Fleet, Node
from elastictrain.runtime.probe import Probe
from elastictrain.runtime.replies import Replies

SILENT_S = 4.0
"""A keeper that answers nothing for so long has its node asked whether it is there."""
STOPPED_S = 2.0
"""One that answers nothing for so long may be stopped; less, and somebody may just look at it."""
STUCK_S = 20.0
"""One that answers nothing for so long on a node that is there, and is not stopped, is replaced all the same."""


@dataclass
class Silence:
    """Listens to the keepers of a fleet; `look` is called twice a second or so."""

    fleet: Fleet
    replies: Replies
    node_failed: Callable[[str, str], None]
    """Told of a node that is not there, and why that is believed."""
    replace_keeper: Callable[[Node, Cause, float], None]
    """Told of a node that is there while its keeper is of no use, why, and since when (unix s)."""
    _heard: dict[str, float] = field(default_factory=dict)
    """When each node's keeper answered last."""
    _looked: float = 0.0
    _probe: Probe | None = None
    _asked: set[Any] = field(default_factory=set)
    """Keepers that a worker is looking at."""

    def heard(self, node: str) -> None:
        """Its keeper has answered."""
        self._heard[node] = time.monotonic()

    def look(self, now: float) -> None:
        """Ask about who has been silent for too long, and tell of who is lost (`now`: monotonic)."""
        looked, self._looked = self._looked, now
        if now - looked >= SILENT_S / 2:  # this process was busy with something else, or stopped: nobody is to blame
            self._heard = dict.fromkeys(self.fleet.nodes, now)
        if self._probe is not None:
            for name in self._probe.silent():
                self.node_failed(name, f"it has answered nothing for {SILENT_S:.0f} s")
        silent = {
            name: now - self._heard.get(name, now) for name, node in self.fleet.nodes.items() if node.info is not None
        }
        asked = {name: self.fleet.nodes[name].raylet for name, s in silent.items() if s > SILENT_S}
        if asked and (self._probe is None or self._probe.done):
            self._probe = Probe(asked)
        for name, seconds in silent.items():
            if seconds > STUCK_S:
                self._lost(name, f"it has answered nothing for {STUCK_S:.0f} s")
            elif seconds > STOPPED_S:
                self._ask_beside(self.fleet.nodes[name])

    def _ask_beside(self, node: Node) -> None:
        """Have a worker on the node look whether the keeper's process is stopped."""
        keeper, info = node.keeper, node.info
        beside = next((w for w in self.fleet.workers.values() if w.node == node.name and w.info is not None), None)
        if info is None or beside is None or keeper in self._asked:
            return
        self._asked.add(keeper)

        def take(stopped: bool) -> None:
            self._asked.discard(keeper)
            if stopped and self.fleet.nodes.get(node.name) is node and node.keeper is keeper:
                self._lost(node.name, "its process is stopped")

        looked = beside.actor.finds_stopped.remote(info.pid)
        self.replies.expect(looked, take, lambda _: self._asked.discard(keeper))

    def _lost(self, name: str, why: str) -> None:
        now = time.monotonic()
        since = time.time() - (now - self._heard.get(name, now))
        self.replace_keeper(self.fleet.nodes[name], Cause("keeper", why), since)
