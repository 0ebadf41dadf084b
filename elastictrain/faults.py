"""Planned faults: kill, crash or raise at a given rank, step and phase. For demos, game days and tests."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Sequence

from elastictrain.config import Fault, FaultPhase


class InjectedError(RuntimeError):
    """What a planned fault of kind `exception` raises, as a bug in user code would."""


class FaultPlan:
    """The faults that may still strike this rank. `announce(index)` is called right before one does."""

    def __init__(self, faults: Sequence[tuple[int, Fault]], rank: int, announce: Callable[[int, int], None]) -> None:
        self._faults = [(index, fault) for index, fault in faults if fault.rank == rank]
        self._announce = announce

    def strike(self, step: int, phase: FaultPhase) -> None:
        """Do what the plan says for this step and phase; returns if that is nothing."""
        for index, fault in self._faults:
            if fault.at == step and fault.phase == phase:
                self._faults = [f for f in self._faults if f[0] != index]
                self._announce(index, step)
                match fault.kind:
                    case "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    case "segfault":
                        ctypes.string_at(0)
                    case "exit":
                        os._exit(1)
                    case "exception":
                        raise InjectedError(f"planned fault {index}: exception at step {step}")
