"""Watching over the pace: feeds `control.suspicion` with what keepers tell, and believes it only when it lasts.

A hang is told when two looks in a row blame the same ranks and those have not moved in between, so a burst of load or
one late message blames nobody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from elastictrain.control.suspicion import Hang, RankAt, Straggler, find_hang, find_stopped, find_straggler, patience_s
from elastictrain.plan.layout import Layout
from elastictrain.runtime.board import Progress

UNKNOWN_PACE_S = 300.0
"""How long a first step may take, before any step has shown how long one is."""
REMEMBERED_STEPS = 50


class Watchdog:
    """Of one attempt. `look` and `straggler` are called as often as there is news."""

    def __init__(self, least_patience_s: float) -> None:
        self._least_s = least_patience_s
        self._steps_s: deque[float] = deque(maxlen=REMEMBERED_STEPS)
        self._generation, self._num_done = -1, 0
        self._layout = Layout(1, 0, 1, 1)
        self._last: tuple[Hang, tuple[tuple[int, int], ...]] | None = None
        self._named: set[int] = set()
        self._stopped: frozenset[str] = frozenset()

    def begin(self, generation: int, layout: Layout) -> None:
        """A generation trains from now on."""
        self._generation, self._num_done, self._last = generation, 0, None
        self._layout = layout
        self._named.clear()

    def step(self, seconds: float) -> None:
        """A step of this generation is done and took so long."""
        self._steps_s.append(seconds)
        self._num_done += 1

    @property
    def patience_s(self) -> float:
        """How long a rank may stand still now."""
        return patience_s(self._steps_s, self._num_done, self._least_s, UNKNOWN_PACE_S)

    def look(self, ranks: Sequence[Progress | None]) -> Hang | None:
        """What each rank does, by rank, newly told; returns a hang that has been seen twice."""
        if any(at is None or at.generation != self._generation for at in ranks):
            self._last = None
            return None
        known = {rank: at for rank, at in enumerate(ranks) if at is not None}
        lockstep = self._layout.pp == 1
        return self._twice(find_hang(_ranks(known), self.patience_s, lockstep), known)

    def look_forming(self, ranks: Sequence[Progress | None]) -> Hang | None:
        """The same while a generation forms: a process that is stopped would have the others wait."""
        known = {rank: at for rank, at in enumerate(ranks) if at is not None}
        return self._twice(find_stopped(_ranks(known)), known)

    def look_spare(self, spares: Mapping[str, Progress]) -> frozenset[str]:
        """Of the workers that wait for a rank, those that were stopped at the last look too: none would take one."""
        stopped = frozenset(name for name, at in spares.items() if find_stopped(_ranks({0: at})))
        again, self._stopped = stopped & self._stopped, stopped
        return again

    def _twice(self, hang: Hang | None, known: Mapping[int, Progress]) -> Hang | None:
        if hang is None:
            self._last = None
            return None
        places = tuple((at.marks, at.waits) for at in known.values())
        again = self._last is not None and (self._last[0].ranks, self._last[1]) == (hang.ranks, places)
        self._last = hang, places
        return hang if again else None

    def straggler(self, own_s: Mapping[int, Iterable[float]]) -> Straggler | None:
        """A rank found slow, once a generation."""
        for stage in range(self._layout.pp):
            peers = {rank: list(steps) for rank, steps in own_s.items() if self._layout.place(rank).pp == stage}
            found = find_straggler(peers)
            if found is not None and found.rank not in self._named:
                self._named.add(found.rank)
                return found
        return None


def _ranks(known: Mapping[int, Progress]) -> dict[int, RankAt]:
    return {
        rank: RankAt(at.phase, at.marks, at.waits, at.waiting, at.silent_s, at.stopped, at.strayed)
        for rank, at in known.items()
    }
