"""To what a failure is put down: the generation that failed, the ranks that were held, their node and process."""

from __future__ import annotations

from collections.abc import Callable, Collection

from elastictrain.control.state import State
from elastictrain.events import Cause
from elastictrain.runtime.fleet import Fleet
from elastictrain.runtime.story import Story


class Attribution:
    """Puts failures on record. Asked before control hears of them, while the state still has who is lost."""

    def __init__(self, fleet: Fleet, story: Story, state: Callable[[], State]) -> None:
        self._fleet, self._story, self._state = fleet, story, state

    def ranks(self, workers: Collection[str]) -> tuple[int, ...]:
        """The ranks that these hold, or held until the fence that is under way; none where nothing fails with them."""
        state = self._state()
        if state.phase not in ("forming", "running", "fencing"):
            return ()
        held = set(workers)
        if state.phase == "fencing":  # who has notice may go then, and nothing fails
            held -= {name for name, worker in state.workers.items() if worker.notice is not None}
        return tuple(rank for rank, name in enumerate(state.members) if name in held)

    def to_worker(self, kind: str, worker: str | None, cause: Cause, at: float | None = None, step: int = 0) -> None:
        """Something failed, and this worker is guilty, or nobody is."""
        handle = self._fleet.workers.get(worker or "")
        self._story.fail(
            kind,
            cause,
            generation=self._generation,
            ranks=self.ranks({worker}) if worker else (),
            node=handle.node if handle else "",
            pid=handle.info.pid if handle and handle.info else 0,
            at=at,
            step=step,
        )

    def to_node(
        self, kind: str, node: str, workers: Collection[str], cause: Cause, at: float | None = None, pid: int = 0
    ) -> None:
        """A node is lost, or its keeper (`pid`), with these workers: a failure where they hold ranks, or a warning."""
        if ranks := self.ranks(workers):
            self._story.fail(kind, cause, generation=self._generation, ranks=ranks, node=node, pid=pid, at=at)
        else:
            self._story.warn("node", cause.message)

    @property
    def _generation(self) -> int:
        """While one is fenced, the state has the next one's number."""
        state = self._state()
        return state.generation - (state.phase == "fencing")
