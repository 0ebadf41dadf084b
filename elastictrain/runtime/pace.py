"""How long each rank works, for the record: step by step in, one event for some steps out (pure).

A window of steps lasts 1 % of the time since the first step, and 2 s at least: a run of any length leaves a few hundred
events, each with one number a rank. A window that a failure cuts off tells of what was committed of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from elastictrain.events import RanksTimed

SHARE = 0.01
SHORTEST_S = 2.0


class Pace:
    """Of one attempt. `take` hands out each window once."""

    def __init__(self) -> None:
        self._first_begun_at: float | None = None
        self._generation = self._first_step = self._last_step = 0
        self._begun_at = self._finished_at = 0.0
        self._sums_s: list[float] = []
        self._over: list[RanksTimed] = []

    def step(self, generation: int, step: int, begun_at: float, finished_at: float, own_s: Sequence[float]) -> None:
        """A step that was done; `own_s` has each rank's seconds of own work."""
        if generation != self._generation:
            self.close()
        if self._first_begun_at is None:
            self._first_begun_at = begun_at
        if not self._sums_s:
            self._generation, self._first_step, self._begun_at = generation, step, begun_at
            self._sums_s = [0.0] * len(own_s)
        self._sums_s = [total + seconds for total, seconds in zip(self._sums_s, own_s, strict=True)]
        self._last_step, self._finished_at = step, finished_at
        if finished_at - self._begun_at >= max(SHORTEST_S, SHARE * (finished_at - self._first_begun_at)):
            self.close()

    def close(self) -> None:
        """End the window that is open, if one is."""
        if self._sums_s:
            steps = self._last_step - self._first_step + 1
            own_s = tuple(round(total / steps, 6) for total in self._sums_s)
            span = self._finished_at, self._begun_at
            self._over.append(RanksTimed(*span, self._generation, self._first_step, self._last_step, own_s))
            self._sums_s = []

    def take(self) -> list[RanksTimed]:
        """The windows that are over."""
        over, self._over = self._over, []
        return over
