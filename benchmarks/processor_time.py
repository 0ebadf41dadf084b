"""Processor seconds by kind of process, for telling where time goes that a stopwatch only sums up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import psutil

KINDS = {"ray::Worker": "workers", "ray::Keeper": "keepers", "ray::Tracker": "tracker"}
"""Ray titles its actors by class and method."""


def used(pids: Iterable[int], otherwise: Mapping[int, str]) -> dict[int, tuple[str, float]]:
    """(kind, seconds) of each process so far; `otherwise` names those that have no title, by pid."""
    found: dict[int, tuple[str, float]] = {}
    for pid in pids:
        try:
            process = psutil.Process(pid)
            title, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.Error:
            continue
        kind = otherwise.get(pid) or next((k for t, k in KINDS.items() if title.startswith(t)), "Ray's own")
        found[pid] = kind, times.user + times.system
    return found


def between(before: Mapping[int, tuple[str, float]], after: Mapping[int, tuple[str, float]]) -> dict[str, float]:
    """Seconds by kind that were used from one moment to another; processes that came or went are left out."""
    seconds: dict[str, float] = defaultdict(float)
    for pid in before.keys() & after.keys():
        kind, now = after[pid]
        seconds[kind] += now - before[pid][1]
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))
