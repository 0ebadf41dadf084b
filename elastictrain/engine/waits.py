"""Telling how long a rank waits for its peers: the part of a step that is none of its own work.

Every collective of torch that blocks, DeepSpeed's among them, ends in `Work.wait`, so one hook there sees them all.
For gloo that is the true time. With nccl `wait` only orders streams and returns at once: what a GPU waits for shows in
no hook on the host, and the times here are near zero.

Cost: two calls of the listener, about 2 us, for each collective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

_plain_wait: Any = dist.Work.wait


def tell_waits(begin: Callable[[int], None], end: Callable[[], None]) -> None:
    """From now on call `begin` before and `end` after each wait of this process, however it ends.

    `begin` gets the kind of the collective, as torch numbers them (all-reduce, all-gather, ...).
    """

    def wait(work: Any, *arguments: Any, **options: Any) -> Any:
        begin(int(work._get_op_type()))
        try:
            return _plain_wait(work, *arguments, **options)
        finally:
            end()

    vars_of_work: Any = dist.Work
    vars_of_work.wait = wait
