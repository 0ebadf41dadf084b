"""A look at a node before it joins: arithmetic, memory, the drive, the storage, the clock. About 50 ms and 32 MB.

A machine that computes wrongly, can't reach the storage or lives in another time does more harm inside a run than
outside, and says so here in a sentence instead of in a stack trace of some collective.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastictrain.errors import ConfigError
from elastictrain.storage import Storage

MAX_SKEW_S = 30.0
"""The events of all nodes are put on one time line: so much disorder would make nonsense of it."""
LEAST_MEMORY_BYTES = 256 << 20
_SIZE = 512


@dataclass(frozen=True, slots=True)
class Preflight:
    """What a node was found to be, a sentence for each problem."""

    refuse: tuple[str, ...]
    """Reasons not to use it."""
    warn: tuple[str, ...]
    """What somebody should see to: training goes on without storage, and with a wrong clock."""


def look(storage: str, run: str, driver_time: float, offload_path: str | None = None) -> Preflight:
    """Look at this node. `driver_time`: the driver's unix time, just now."""
    refuse = (wrong_arithmetic(np.matmul), _memory(), _drive(offload_path))
    warn = (_storage(storage, run), _clock(driver_time))
    return Preflight(tuple(filter(None, refuse)), tuple(filter(None, warn)))


def wrong_arithmetic(multiply: Callable[[Any, Any], Any]) -> str:
    """Multiply small integers in floats: every product and sum is exact, so one wrong element shows."""
    random = np.random.default_rng(secrets.randbits(64))
    a, b = (random.integers(-8, 9, (_SIZE, _SIZE)) for _ in range(2))
    v = random.integers(1, 9, _SIZE)
    product = multiply(a.astype(np.float32), b.astype(np.float32))
    exact = np.array_equal(product.astype(np.int64) @ v, a @ (b @ v))  # Freivalds 1977: a check in n^2, not n^3
    return "" if exact else "its processor multiplies wrongly: take it out of service"


def _memory() -> str:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available >= LEAST_MEMORY_BYTES or _reclaimable() >= LEAST_MEMORY_BYTES:
        return ""
    return f"it has {available >> 20} MiB of memory left, and {LEAST_MEMORY_BYTES >> 20} are the least to keep state in"


def _reclaimable() -> int:
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _drive(folder: str | None) -> str:
    if folder is None or os.access(folder, os.W_OK | os.X_OK):
        return ""
    what = "may not be written to" if os.path.isdir(folder) else "is no folder"
    return f"its parallel.offload_path {folder} {what}: make it, or set parallel.offload to cpu"


def _storage(storage: str, run: str) -> str:
    try:
        Storage.open(storage).run(run).check_writable()
    except ConfigError as error:
        return str(error)
    return ""


def _clock(driver_time: float) -> str:
    skew_s = time.time() - driver_time
    if abs(skew_s) <= MAX_SKEW_S:
        return ""
    return f"its clock is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the driver's: set it (chrony)"
