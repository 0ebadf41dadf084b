"""Telling a lack of memory from other errors, without torch: a process that only hears of one need not import it."""

from __future__ import annotations

import re

_MESSAGE = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|CUDA (error: )?out of memory"
    r"|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch's on an accelerator, one of the libraries under it, torch's on the CPU (a
    plain RuntimeError), or Python's own."""
    torch_s = any((kind.__module__, kind.__name__) == ("torch", "OutOfMemoryError") for kind in type(error).__mro__)
    if torch_s or isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and _MESSAGE.search(str(error)) is not None
