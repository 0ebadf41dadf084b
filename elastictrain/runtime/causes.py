"""From Ray's errors to causes: the first line that a person needs, and the worker's own traceback."""

from __future__ import annotations

from ray.exceptions import RayActorError, RayError, RayTaskError

from elastictrain.errors import PeerLostError
from elastictrain.events import Cause


def explain(error: RayError) -> Cause:
    """What a failed call tells."""
    if isinstance(error, RayTaskError):
        inner = error.cause
        line = f"{type(inner).__name__}: {inner}".splitlines()[0]
        return Cause("exception", line, str(error), type(inner).__name__)
    if isinstance(error, RayActorError):
        return Cause("unknown", "its process or its node is gone (Ray lost the connection)")
    return Cause("unknown", str(error).splitlines()[0])


def is_peer_loss(error: RayError) -> bool:
    """Whether a call failed only because another rank went away."""
    return isinstance(error, RayTaskError) and isinstance(error.cause, PeerLostError | InterruptedError)
