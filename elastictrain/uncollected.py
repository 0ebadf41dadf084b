"""Imports without garbage collection: they make hundreds of thousands of objects, and all of them stay.

For the large ones: torch, DeepSpeed, MLflow. A tenth of their processor time is walking over what was made before.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No collection by itself meanwhile, in any thread; one that is asked for is done."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
