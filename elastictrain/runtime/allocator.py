"""How workers get memory from the system: in huge pages, and kept for the next step.

Each step asks for the same buffers of megabytes again. The C library's defaults give those back to the system when a
step is done with them and fetch them anew, zeroed, 4 KiB at a time. With these settings a worker keeps them (up to
1 GiB that it does not use) and asks for pages of 2 MiB, where the kernel has them to give. What that saves of a step is
the difference between `benchmarks/overhead.py` with and without `--same-allocator`. Results stay the same bits.

They count from a process's first instruction, so they go into the environment that Ray starts a worker with. What the
driver's own environment says of them is handed on instead. Other C libraries don't read them.
"""

from __future__ import annotations

import os

_KEPT_BYTES = 1 << 30
_SETTINGS = {
    # One tunable and no more: the C library cuts the variable off after the first when a process starts, and a worker
    # is started by way of others.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(_KEPT_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT_BYTES),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""The GNU C Library manual, Memory Allocation Tunables."""


def allocator_environment() -> dict[str, str]:
    """The variables for a worker's process."""
    return {name: os.environ.get(name, value) for name, value in _SETTINGS.items()}
