"""Telling a broken collective from an error of the model, the data or the engine.

Torch reports a lost peer as `DistBackendError`, `DistNetworkError` or `DistStoreError`, or, from gloo, as a plain
RuntimeError whose message names gloo's source file or the state of the connection. A lost peer is never the first
cause of a failure, so mistaking a user's error for one would hide it: only what is recognised is reclassified.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from elastictrain.errors import PeerLostError

_BROKEN_COLLECTIVE = re.compile(
    r"gloo/|Gloo |ProcessGroupGloo|ProcessGroupNCCL|NCCL error|NCCL communicator was aborted"
    r"|Connection (closed|reset) by peer|Broken pipe|Timed out waiting \d+ms",
)


def classify(error: BaseException) -> BaseException:
    """PeerLostError (caused by `error`) when a collective or the rendezvous broke, else `error` itself."""
    if isinstance(error, PeerLostError) or not _is_broken_collective(error):
        return error
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    lost = PeerLostError(f"a collective broke because another rank went away: {first_line}")
    lost.__cause__ = error
    return lost


@contextmanager
def peer_loss_named() -> Iterator[None]:
    """Raise PeerLostError in place of whatever torch raises when a collective breaks."""
    try:
        yield
    except RuntimeError as error:
        named = classify(error)
        if named is error:
            raise
        raise named from error


def _is_broken_collective(error: BaseException) -> bool:
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and _BROKEN_COLLECTIVE.search(str(error)) is not None
