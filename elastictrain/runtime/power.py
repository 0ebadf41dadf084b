"""The energy that this node's processors and GPUs have used, where their counters can be read.

Processors tell it through the kernel's powercap tree (Intel and AMD; many systems let only root read it, and most
virtual machines have none), NVIDIA's GPUs through NVML, where its Python binding is installed. What is read is a
counter, so no moment between two looks is missed. Of the rest of the machine (fans, disks, memory beside the
processor's package) nothing is known. A look costs some 10 us a package, and about 1 ms a GPU.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


class PowerMeter:
    """Joules from one look to the next."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._packages = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        self._nvml, self._gpus = _gpus()
        self._last = self._counters()

    def look(self) -> float | None:
        """Joules since the look before, or None where nothing tells them."""
        now, before = self._counters(), self._last
        self._last = now
        both = now.keys() & before.keys()
        if not both:
            return None
        return sum((now[source] - before[source]) % self._wrap_j(source) for source in both)

    def _counters(self) -> dict[Path | int, float]:
        """Joules so far by package, and by number of GPU."""
        found: dict[Path | int, float] = {}
        for zone in self._packages:
            try:
                found[zone] = int((zone / "energy_uj").read_text()) / 1e6
            except (OSError, ValueError):  # not for this user, or gone
                continue
        for number, gpu in enumerate(self._gpus):
            try:
                found[number] = self._nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3
            except self._nvml.NVMLError:  # older GPUs don't count
                continue
        return found

    def _wrap_j(self, source: Path | int) -> float:
        """Where this counter begins at 0 again."""
        if isinstance(source, int):
            return float("inf")
        return int((source / "max_energy_range_uj").read_text()) / 1e6


def _gpus() -> tuple[Any, list[Any]]:
    """NVML and handles of this node's GPUs; none where there is no binding or no driver."""
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return None, []
    try:
        nvml.nvmlInit()
        return nvml, [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return nvml, []
