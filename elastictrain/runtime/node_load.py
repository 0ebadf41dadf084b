"""How busy this node is, as its kernel says. A look reads two files of /proc, some 100 us, and what `power` does."""

from __future__ import annotations

from pathlib import Path

from elastictrain.events import NodeLoad
from elastictrain.runtime.power import PowerMeter

_STAT, _MEMORY = Path("/proc/stat"), Path("/proc/meminfo")


class LoadMeter:
    """This node's processors and memory; a share of the processors is that since the look before."""

    def __init__(self) -> None:
        self._busy, self._all = _ticks()
        self._power = PowerMeter()

    def look(self, node: str) -> NodeLoad:
        """The load now."""
        busy, ticks = _ticks()
        passed = ticks - self._all
        share = (busy - self._busy) / passed if passed > 0 else 0.0
        self._busy, self._all = busy, ticks
        rows = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
        whole, free = (int(rows[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
        return NodeLoad(node, min(max(share, 0.0), 1.0), whole - free, whole, self._power.look())


def _ticks() -> tuple[int, int]:
    """Of all processors together since the start: busy, and all."""
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, _STAT.read_text().split(maxsplit=9)[1:9])
    busy = user + nice + system + irq + softirq + steal
    return busy, busy + idle + iowait
