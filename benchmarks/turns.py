"""Two jobs that share a machine in turns: while one computes, all processes of the other are stopped (SIGSTOP).

A machine's speed drifts by more than what is to be measured: other work, other tenants, heat. Turns of a few seconds
put both jobs through the same weather, where one whole run after the other would not. What others take meanwhile is
measured too (their processor time, and what the hypervisor steals), and a pair of turns that they disturb is repeated.
"""

from __future__ import annotations

import os
import signal
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

DISTURBED = 0.06
"""Share of the machine's processors that others may take in an undisturbed turn."""

Pids = Callable[[], Iterable[int]]
"""The processes of a job, as they are now."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A time, unix seconds, in which one job had the machine."""

    begun: float
    ended: float
    others: float
    """Share of the processors that was not the two jobs'."""

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


def undisturbed(pair: tuple[Turn, Turn]) -> bool:
    """Whether both turns had the machine to themselves."""
    return max(turn.others for turn in pair) <= DISTURBED


def take_turns(jobs: tuple[Pids, Pids], num_quiet: int, num_most: int, turn_s: float) -> list[tuple[Turn, Turn]]:
    """Pairs of turns in changing order, until so many were undisturbed, or `num_most` in all; then both compute."""
    turns: list[tuple[Turn, Turn]] = []
    try:
        while len(turns) < num_most and sum(map(undisturbed, turns)) < num_quiet:
            first = len(turns) % 2
            pair: dict[int, Turn] = {}
            for job in (first, 1 - first):
                _signal(jobs[1 - job](), signal.SIGSTOP)
                _signal(jobs[job](), signal.SIGCONT)
                pair[job] = _measure(jobs, turn_s)
            turns.append((pair[0], pair[1]))
    finally:
        for pids in jobs:
            _signal(pids(), signal.SIGCONT)
    return turns


def _measure(jobs: tuple[Pids, Pids], turn_s: float) -> Turn:
    begun, busy_s, own_s = time.time(), _busy_s(), _own_s(jobs)
    time.sleep(turn_s)
    ended = time.time()
    others_s = (_busy_s() - busy_s) - (_own_s(jobs) - own_s)
    return Turn(begun, ended, max(0.0, others_s) / ((ended - begun) * psutil.cpu_count()))


def _busy_s() -> float:
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice


def _own_s(jobs: tuple[Pids, Pids]) -> float:
    seconds = 0.0
    for pid in {os.getpid(), *jobs[0](), *jobs[1]()}:
        with suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            seconds += times.user + times.system
    return seconds


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        # it may just have ended
        with suppress(ProcessLookupError):
            os.kill(pid, number)
