"""How workers get memory from the system: it is kept for the next step.

Each step asks for the same buffers of megabytes again. The C library's defaults give those back to the system when a
step is done with them, and fetch them anew, zeroed, a page at a time. With these settings a worker keeps them, up to
1 GiB that it does not use. What that saves of a step is the difference between `benchmarks/overhead.py` with and
without `--same-allocator`. Results stay the same bits.

They are made in the process, before torch is imported, and not by variables of its environment: a worker that needs an
environment of its own can be none of the processes that Ray has started already, and Ray imports itself twice in it.
"""

from __future__ import annotations

import ctypes
import os

_KEPT_BYTES = 1 << 30
_GROWTH_BYTES = 64 << 20
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8  # malloc.h
_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": (_MMAP_THRESHOLD, _KEPT_BYTES),
    "MALLOC_TRIM_THRESHOLD_": (_TRIM_THRESHOLD, _KEPT_BYTES),
    "MALLOC_TOP_PAD_": (_TOP_PAD, _GROWTH_BYTES),
    "MALLOC_ARENA_MAX": (_ARENA_MAX, 1),  # those of threads grow to 64 MiB only
}
"""The GNU C Library manual, Malloc Tunable Parameters: the variable that sets each, the parameter and its value."""


def keep_memory() -> bool:
    """Set up this process's malloc; what its environment says of it stays. False where the C library can't be told."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    taken = [mallopt(*setting) for variable, setting in _SETTINGS.items() if variable not in os.environ]
    return all(taken)
