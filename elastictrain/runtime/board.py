"""Where a rank is, in memory that outlives it: generation, step, phase and time, written many times a step.

One 32-byte record in an arena that the node's keeper owns. Writing costs about a microsecond and no message; the
keeper reads it for the live status, for finding a rank that makes no progress, and to say what a dead one was doing.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass

_RECORD = struct.Struct("<qqqd")
BOARD_BYTES = 4096

PHASES = ("idle", "forming", "data", "forward", "backward", "update", "snapshot", "waiting")


@dataclass(frozen=True, slots=True)
class Progress:
    """What a rank was doing at `at` (unix time, seconds)."""

    generation: int
    step: int
    phase: str
    at: float


class Board:
    """One worker's record in a shared buffer. One writer; a reader may see two fields of different writes."""

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer

    def write(self, generation: int, step: int, phase: str) -> None:
        """Say where this rank is now."""
        _RECORD.pack_into(self._buffer, 0, generation, step, PHASES.index(phase), time.time())

    def read(self) -> Progress:
        """The last thing written."""
        generation, step, phase, at = _RECORD.unpack_from(self._buffer, 0)
        return Progress(generation, step, PHASES[phase], at)
