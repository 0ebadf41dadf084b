"""What a measurement was taken on, so that its numbers can be read later."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("elastictrain", "torch", "deepspeed", "ray")


def describe() -> dict[str, Any]:
    """Processor, cores, load and versions; the load is that of the last minute, before anything was started."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def line(machine: dict[str, Any]) -> str:
    """The same in one line for people."""
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", *PACKAGES))
    return f"{machine['cores']} cores of {machine['cpu']}, load {machine['load_before']} before; {versions}"


def _cpu() -> str:
    for row in Path("/proc/cpuinfo").read_text().splitlines():
        if row.startswith("model name"):
            return row.partition(":")[2].strip()
    return platform.machine()
