"""Where a rank is, in memory that outlives it: generation, step, phase and time, written many times a step.

Three records in an arena that the node's keeper owns: what the rank does, whether it waits for its peers in a
collective, and how much memory it uses. A last part takes the stacks of its threads when somebody asks for them.
Writing costs about a microsecond and no message; the keeper reads it for the live status, for finding a rank that makes
no progress, and to say what a dead one was doing.
"""

from __future__ import annotations

import math
import struct
import time
from dataclasses import dataclass

_DOING = struct.Struct("<qqqdq")
_WAITING = struct.Struct("<q??6xdd")
_WAITING_AT = 64
_MEMORY = struct.Struct("<q")
_MEMORY_AT = 128
STACKS_AT = 4096
BOARD_BYTES = STACKS_AT + (64 << 10)

PHASES = ("idle", "forming", "data", "forward", "backward", "update", "snapshot", "waiting")


@dataclass(frozen=True, slots=True)
class Progress:
    """What a rank was doing at `at` (unix time, seconds), when it began that."""

    generation: int
    """-1 before it has written anything."""
    step: int
    phase: str
    at: float
    marks: int = 0
    """Phases begun in this generation: the same number in every rank at the same place of the program."""
    waits: int = 0
    """Collectives waited for in this generation, the one under way among them."""
    waiting: bool = False
    """Whether it waits for its peers in a collective now."""
    strayed: bool = False
    """In this step it waited in a collective that is not of the kind that had this place in the step before."""
    blocked_s: float = 0.0
    """Seconds spent waiting for peers in this generation."""
    silent_s: float = 0.0
    """Since it last wrote anything, by its node's clock; inf before that."""
    stopped: bool = False
    """Its process is stopped (SIGSTOP, a debugger)."""
    memory_bytes: int = 0
    """In use on its device when it was last measured; 0 before."""


class Board:
    """One worker's record in a shared buffer. One writer; a reader may see two fields of different writes."""

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer
        self._generation, self._marks = -1, 0
        self._waits, self._blocked_s, self._waiting_since = 0, 0.0, 0.0
        self._step, self._kinds, self._kinds_before = -1, list[int](), list[int]()
        self._strayed = False

    def move(self, buffer: memoryview) -> None:
        """Write there from now on: to the next keeper's memory."""
        self._buffer = buffer

    def write(self, generation: int, step: int, phase: str) -> None:
        """Say where this rank is now."""
        if generation != self._generation:
            self._generation, self._marks = generation, 0
            self._waits, self._blocked_s = 0, 0.0
            self._step, self._kinds = -1, []
        if step != self._step:
            self._step, self._kinds, self._kinds_before, self._strayed = step, [], self._kinds, False
        self._marks += 1
        _DOING.pack_into(self._buffer, 0, generation, step, PHASES.index(phase), time.time(), self._marks)

    def begin_wait(self, kind: int) -> None:
        """This rank waits for its peers in a collective of this kind from now on."""
        place, known = len(self._kinds), self._kinds_before
        self._kinds.append(kind)
        self._strayed |= bool(known) and known[place : place + 1] != [kind]
        self._waits += 1
        self._waiting_since = time.time()
        self._write_wait(True, self._waiting_since)

    def end_wait(self) -> None:
        """The collective is done, or broke."""
        now = time.time()
        self._blocked_s += now - self._waiting_since
        self._write_wait(False, now)

    def write_memory(self, num_bytes: int) -> None:
        """Say how much memory this rank has in use on its device."""
        _MEMORY.pack_into(self._buffer, _MEMORY_AT, num_bytes)

    @property
    def blocked_s(self) -> float:
        """Seconds that this rank has waited for its peers in this generation."""
        return self._blocked_s

    def read(self) -> Progress:
        """The last thing written."""
        generation, step, phase, at, marks = _DOING.unpack_from(self._buffer, 0)
        waits, waiting, strayed, waited_at, blocked_s = _WAITING.unpack_from(self._buffer, _WAITING_AT)
        written_at = max(at, waited_at)
        silent_s = max(0.0, time.time() - written_at) if written_at else math.inf
        (memory_bytes,) = _MEMORY.unpack_from(self._buffer, _MEMORY_AT)
        return Progress(
            generation if at else -1,
            step,
            PHASES[phase],
            at,
            marks,
            waits,
            waiting,
            strayed,
            blocked_s,
            silent_s,
            memory_bytes=memory_bytes,
        )

    def _write_wait(self, waiting: bool, at: float) -> None:
        _WAITING.pack_into(self._buffer, _WAITING_AT, self._waits, waiting, self._strayed, at, self._blocked_s)
