"""Whether it was the kernel's OOM killer that ended a process of this node.

SIGKILL looks the same whoever sends it, but the kernel counts its own: each memory cgroup those among its processes
(v2: memory.events, v1: memory.oom_control), and /proc/vmstat, read where no cgroup is in sight, those of the machine.
The count rises before the signal is sent. The workers of a node share its keeper's cgroup, so one rise explains one
SIGKILL; that it was this worker's, and not that of another process that was killed at the same time, can't be known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from elastictrain.events import Cause

_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
_CGROUPS = Path("/sys/fs/cgroup")


class OomKills:
    """Explains deaths; `look` writes off the kills so far, that of processes that nobody watches."""

    def __init__(self, counters: tuple[Path, ...] | None = None) -> None:
        candidates = _counters() if counters is None else counters
        self._counter = next((path for path in candidates if _read(path) is not None), None)
        self._explained = 0
        self.look()

    def look(self) -> None:
        """What was killed until now explains no death to come."""
        self._explained = self._count()

    def explain(self, cause: Cause) -> Cause:
        """The cause of a death, as the kernel's count makes it more precise."""
        if cause != Cause("signal", "SIGKILL") or self._count() <= self._explained:
            return cause
        self._explained += 1
        return Cause("oom", "SIGKILL by the kernel's OOM killer: the memory of the node, or of its container, ran out")

    def _count(self) -> int:
        return (_read(self._counter) if self._counter is not None else None) or 0


def _counters() -> Iterator[Path]:
    """Where this process's kills may be counted, the closest first."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield _CGROUPS / path.lstrip("/") / "memory.events"
        elif "memory" in controllers.split(","):
            yield _CGROUPS / "memory" / path.lstrip("/") / "memory.oom_control"
    yield Path("/proc/vmstat")


def _read(counter: Path) -> int | None:
    """The count in this file; None where there is none."""
    try:
        found = _COUNT.search(counter.read_text())
    except OSError:
        return None
    return int(found[1]) if found else None
