"""The supervisor asks its nodes now and then how busy they are, for the record, and notes the memory of its ranks.

Every 10 s, and less often as the attempt grows older (1 % of its age): an attempt of any length leaves a few hundred
events. One message a node each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ray.exceptions import RayError

from elastictrain.events import Event, NodeLoad, NodesMeasured
from elastictrain.runtime.fleet import Fleet
from elastictrain.runtime.replies import Replies

EVERY_S = 10.0
SHARE = 0.01


class LoadWatch:
    """Asks the keepers and tells of their answers; `look` is called often, and waits for nothing."""

    def __init__(
        self, fleet: Fleet, replies: Replies, rank_memory: Callable[[], tuple[int, ...]], emit: Callable[[Event], None]
    ) -> None:
        self._fleet, self._replies, self._rank_memory, self._emit = fleet, replies, rank_memory, emit
        self._begun = self._asked = time.monotonic()
        self._found: dict[str, NodeLoad] = {}

    def look(self, step: int) -> None:
        """Tell what was heard since the last time, and ask again, when it is time."""
        now = time.monotonic()
        if now < self._asked + max(EVERY_S, SHARE * (now - self._begun)):
            return
        self._asked = now
        if self._found:
            loads = tuple(load for _, load in sorted(self._found.items()))
            self._emit(NodesMeasured(time.time(), step, loads, self._rank_memory()))
            self._found.clear()
        for node in self._fleet.nodes.values():
            if node.info is not None:
                self._replies.expect(node.keeper.load.remote(), self._hear, _keeper_is_gone)

    def _hear(self, load: NodeLoad) -> None:
        self._found[load.node] = load


def _keeper_is_gone(error: RayError) -> None:
    """The roster finds that by itself."""
