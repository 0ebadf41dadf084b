"""Jobs that share a machine in turns: while one computes, all processes of the others are stopped (SIGSTOP).

A machine's speed drifts by more than what is to be measured: other work, other tenants, heat. Turns of a few seconds
put all jobs through the same weather, where one whole run after the other would not. What else runs meanwhile is
measured too (its processor time, and what the hypervisor steals), and a round of turns that it disturbs is repeated.
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
    """Share of the processors that was none of the jobs'."""

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


Round = tuple[Turn, ...]
"""A turn of each job, in the order of the jobs."""


def undisturbed(turns: Round) -> bool:
    """Whether all had the machine to themselves."""
    return max(turn.others for turn in turns) <= DISTURBED


def take_turns(jobs: Sequence[Pids], num_quiet: int, num_most: int, turn_s: float) -> list[Round]:
    """Rounds of turns in changing order, until so many were undisturbed, or `num_most` in all; then all compute."""
    rounds: list[Round] = []
    try:
        while len(rounds) < num_most and sum(map(undisturbed, rounds)) < num_quiet:
            first = len(rounds) % len(jobs)
            taken: dict[int, Turn] = {}
            for number in (*range(first, len(jobs)), *range(first)):
                for other in range(len(jobs)):
                    if other != number:
                        _signal(jobs[other](), signal.SIGSTOP)
                _signal(jobs[number](), signal.SIGCONT)
                taken[number] = _measure(jobs, turn_s)
            rounds.append(tuple(taken[number] for number in range(len(jobs))))
    finally:
        for pids in jobs:
            _signal(pids(), signal.SIGCONT)
    return rounds


def _measure(jobs: Sequence[Pids], turn_s: float) -> Turn:
    begun, busy_s, own_s = time.time(), _busy_s(), _own_s(jobs)
    time.sleep(turn_s)
    ended = time.time()
    others_s = (_busy_s() - busy_s) - (_own_s(jobs) - own_s)
    return Turn(begun, ended, max(0.0, others_s) / ((ended - begun) * psutil.cpu_count()))


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _own_s(jobs: Sequence[Pids]) -> float:
    seconds = 0.0
    for pid in {os.getpid(), *(pid for pids in jobs for pid in pids())}:
        with suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            seconds += times.user + times.system
    return seconds


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        # it may just have ended
        with suppress(ProcessLookupError):
            os.kill(pid, number)
