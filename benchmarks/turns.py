"""Two jobs that share a machine in turns: while one computes, all processes of the other are stopped (SIGSTOP).

A machine's speed drifts by more than what is to be measured: other work, other tenants, heat. Turns of a few seconds
put both jobs through the same weather, where one whole run after the other would not.
"""

from __future__ import annotations

import os
import signal
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

Pids = Callable[[], Iterable[int]]
"""The processes of a job, as they are now."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A time, unix seconds, in which one job had the machine."""

    begun: float
    ended: float

    def steps_per_s(self, ends: Sequence[float]) -> float:
        """Speed from the first end of a step within the turn to the last; `ends` is sorted."""
        inside = self._inside(ends)
        if len(inside) < 2:
            raise RuntimeError(
                f"{len(inside)} steps ended in a turn of {self.ended - self.begun:.1f} s: make it longer"
            )
        return (len(inside) - 1) / (inside[-1] - inside[0])

    def num_ended(self, ends: Sequence[float]) -> int:
        """Steps that ended within the turn."""
        return len(self._inside(ends))

    def _inside(self, ends: Sequence[float]) -> Sequence[float]:
        return ends[bisect_left(ends, self.begun) : bisect_right(ends, self.ended)]


def take_turns(jobs: tuple[Pids, Pids], num_turns: int, turn_s: float) -> list[tuple[Turn, Turn]]:
    """So many turns for each job, in changing order; afterwards both compute again."""
    turns: list[tuple[Turn, Turn]] = []
    try:
        for number in range(num_turns):
            first = number % 2
            pair = [Turn(0, 0), Turn(0, 0)]
            for job in (first, 1 - first):
                _signal(jobs[1 - job](), signal.SIGSTOP)
                _signal(jobs[job](), signal.SIGCONT)
                begun = time.time()
                time.sleep(turn_s)
                pair[job] = Turn(begun, time.time())
            turns.append((pair[0], pair[1]))
    finally:
        for job in jobs:
            _signal(job(), signal.SIGCONT)
    return turns


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        # it may just have ended
        with suppress(ProcessLookupError):
            os.kill(pid, number)
