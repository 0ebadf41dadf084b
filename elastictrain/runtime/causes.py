"""From Ray's errors to causes: the first line that a person needs, and the worker's own traceback."""

from __future__ import annotations

from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from elastictrain.errors import PeerLostError
from elastictrain.events import Cause

_KILLED_FOR_MEMORY = "running low on memory"
"""Ray's words in the error of an actor that its memory monitor killed; a task gets an error type of its own."""


def explain(error: RayError) -> Cause:
    """What a failed call tells."""
    if isinstance(error, RayTaskError):
        from elastictrain.engine.failures import is_out_of_memory

        inner = error.cause
        line = f"{type(inner).__name__}: {inner}".splitlines()[0]
        kind = "oom" if is_out_of_memory(inner) else "exception"
        return Cause(kind, line, str(error), type(inner).__name__)
    if isinstance(error, OutOfMemoryError) or _KILLED_FOR_MEMORY in str(error):
        return Cause("oom", "killed by Ray's memory monitor: the node ran low on memory", str(error))
    if isinstance(error, RayActorError):
        return Cause("unknown", "its process or its node is gone (Ray lost the connection)")
    return Cause("unknown", str(error).splitlines()[0])


def is_peer_loss(error: RayError) -> bool:
    """Whether a call failed only because another rank went away."""
    return isinstance(error, RayTaskError) and isinstance(error.cause, PeerLostError | InterruptedError)
