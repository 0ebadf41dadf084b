"""Keeping watch over the ranks of the running generation: ends those that hang, names those that are slow.

A worker that waits for a rank and is stopped is ended too: it would take none.

`watchdog` says who; here the guilty are asked for the stacks of their threads, ended, and told of. What that means for
the run is the supervisor's to say.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from elastictrain.config import ElasticSection
from elastictrain.control import vocabulary as v
from elastictrain.control.state import State
from elastictrain.events import Cause, StragglerFound
from elastictrain.plan.layout import Layout
from elastictrain.runtime.board import Progress
from elastictrain.runtime.replies import Replies
from elastictrain.runtime.roster import Roster
from elastictrain.runtime.story import Story
from elastictrain.runtime.watchdog import Watchdog


class LoseWorker(Protocol):
    """Tells that a worker is lost; see `Supervisor.worker_lost`."""

    def __call__(self, name: str, cause: Cause, at: float | None = None, step: int = 0, kind: str = "") -> None: ...


@dataclass
class Vigil:
    """Of one attempt. `look` when keepers have told where their ranks are, `step` when a step is committed."""

    config: ElasticSection
    roster: Roster
    replies: Replies
    story: Story
    lose_worker: LoseWorker
    tell: Callable[[v.Observation], None]
    accused: set[str] = field(default_factory=set)
    """Workers that are being ended because they hang: their end is told when their stacks are there."""

    def __post_init__(self) -> None:
        self._watchdog = Watchdog(self.config.hang_patience_s)

    def begin(self, generation: int, layout: Layout) -> None:
        """This generation trains from now on."""
        self._watchdog.begin(generation, layout)

    def step(self, seconds: float) -> None:
        """A step is committed, and took so long."""
        self._watchdog.step(seconds)

    def look(self, state: State) -> None:
        """End ranks that hold up the others, if they have done so for too long; and spares that would."""
        if state.phase not in ("forming", "running"):
            return
        told = self.roster.progress
        spares = {name: told[name] for name in state.standbys if name in told}
        self._end(self._watchdog.look_spare(spares), Cause("hang", "its process is stopped"), state)
        ranks = [told.get(name) for name in state.members]
        hang = self._watchdog.look(ranks) if state.phase == "running" else self._watchdog.look_forming(ranks)
        if hang is None:
            return
        cause = Cause("hang", hang.message)
        if hang.ranks:
            self._end([state.members[rank] for rank in hang.ranks], cause, state)
        else:
            self.story.fail("hang", cause, generation=state.generation)
            self.tell(v.PeersBroken(state.generation, cause))

    def _end(self, names: Iterable[str], cause: Cause, state: State) -> None:
        for name in names:
            handle, at = self.roster.fleet.workers.get(name), self.roster.progress[name]
            if handle is None or name in self.accused:
                continue
            self.accused.add(name)

            def tell(stacks: str, name: str = name, at: Progress = at) -> None:
                self.accused.discard(name)
                trains = at.generation == state.generation  # else it tells of what it did before
                since, step = (time.time() - at.silent_s, at.step) if trains else (None, 0)
                self.lose_worker(name, replace(cause, traceback=stacks), since, step, "hang")

            end = self.roster.fleet.nodes[handle.node].keeper.end.remote(name, not at.stopped)
            self.replies.expect(end, tell, lambda _, tell=tell: tell(""))  # type: ignore[misc]  # defaults bind

    def name_straggler(self, state: State) -> None:
        """Tell of a slow rank, and have it replaced if that is wanted."""
        if state.phase != "running" or self.config.straggler == "ignore":
            return
        found = self._watchdog.straggler(self.story.commits.own_s)
        if found is None:
            return
        name = state.members[found.rank]
        node = self.roster.fleet.workers[name].node
        self.story.record(
            StragglerFound(
                time.time(), state.generation, self.story.step, found.rank, name, node, found.own_s, found.others_s
            )
        )
        if self.config.straggler == "replace":
            self.tell(v.Leaving(f"rank {found.rank} is slow", math.inf, worker=name))
