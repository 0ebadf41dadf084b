"""From Ray's errors to causes: the first line that a person needs, and the worker's own traceback."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from elastictrain.engine.out_of_memory import is_out_of_memory
from elastictrain.errors import PeerLostError
from elastictrain.events import Cause

_KILLED_FOR_MEMORY = "running low on memory"
"""Ray's words in the error of an actor that its memory monitor killed; a task gets an error type of its own."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
"""Ray colours its tracebacks, wherever they go."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call of a worker failed, as plain data: the error itself may be of code that only the worker has."""

    cause: Cause
    unreachable: bool = False
    """The worker is gone, or it could not reach somebody who is."""
    peers_lost: bool = False
    """Only because another rank went away."""


def failure_of(error: Exception) -> Failure:
    """What became of a call that raised this: one of Ray's errors, or whatever its answer can't be read for."""
    if not isinstance(error, RayError):
        return Failure(Cause("unknown", f"{type(error).__name__}: {error}".splitlines()[0]))
    return Failure(explain(error), isinstance(error, RayActorError), is_peer_loss(error))


def explain(error: RayError) -> Cause:
    """What a failed call tells."""
    if isinstance(error, RayTaskError):
        inner = error.cause
        line = f"{type(inner).__name__}: {inner}".splitlines()[0]
        kind = "oom" if is_out_of_memory(inner) else "exception"
        return Cause(kind, line, _COLOUR.sub("", str(error)), type(inner).__name__)
    if isinstance(error, OutOfMemoryError) or _KILLED_FOR_MEMORY in str(error):
        return Cause("oom", "killed by Ray's memory monitor: the node ran low on memory", str(error))
    if isinstance(error, RayActorError):
        return Cause("unknown", "its process or its node is gone (Ray lost the connection)")
    return Cause("unknown", str(error).splitlines()[0])


def is_peer_loss(error: RayError) -> bool:
    """Whether a call failed only because another rank went away."""
    return isinstance(error, RayTaskError) and isinstance(error.cause, PeerLostError | InterruptedError)
