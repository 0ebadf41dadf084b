"""Planned faults at a given rank, step and phase: death, hangs, slowness, flipped bits, errors. For demos and tests."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from elastictrain.config import Fault, FaultPhase, FaultTarget


class InjectedError(RuntimeError):
    """What a planned fault of kind `exception` raises, as a bug in user code would."""


class FaultPlan:
    """The faults that may still strike this rank. `announce(index, step)` is called right before one does."""

    def __init__(
        self,
        faults: Sequence[tuple[int, Fault]],
        rank: int,
        announce: Callable[[int, int], None],
        flip_bit: Callable[[FaultTarget], None],
    ) -> None:
        self._faults = [(index, fault) for index, fault in faults if fault.rank == rank]
        self._announce = announce
        self._slow_s = 0.0
        self._nan_due = False
        self._flip_bit = flip_bit

    def strike(self, step: int, phase: FaultPhase) -> None:
        """Do what the plan says for this step and phase; returns if that is nothing, or nothing deadly."""
        if self._slow_s and phase in ("forward", "backward"):
            time.sleep(self._slow_s)
        for index, fault in self._faults:
            if fault.at == step and phase == ("forward" if fault.kind == "nan" else fault.phase):
                self._faults = [f for f in self._faults if f[0] != index]
                self._announce(index, step)
                match fault.kind:
                    case "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    case "segfault":
                        ctypes.string_at(0)
                    case "preempt":
                        os.kill(os.getpid(), signal.SIGTERM)
                    case "exit":
                        os._exit(1)
                    case "stop":
                        os.kill(os.getpid(), signal.SIGSTOP)
                    case "loop":
                        _compute_for_ever()
                    case "skip":
                        _skip_next_collective()
                    case "slow":
                        self._slow_s = fault.seconds
                    case "bitflip":
                        self._flip_bit(fault.where)
                    case "exception":
                        raise InjectedError(f"planned fault {index}: exception at step {step}")
                    case "oom":
                        from torch import OutOfMemoryError

                        raise OutOfMemoryError(f"planned fault {index}: out of memory at step {step}")
                    case "nan":
                        self._nan_due = True

    def nan_due(self) -> bool:
        """Whether a fault of kind `nan` has struck since the last call."""
        due, self._nan_due = self._nan_due, False
        return due


def _compute_for_ever() -> None:
    number = 1
    while True:
        number = number * 48271 % 2147483647


def _skip_next_collective() -> None:
    """As a rank does whose code takes another branch than its peers': the next collective is not entered."""
    import torch.distributed as dist

    names = ("all_reduce", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "barrier")
    plain = {name: getattr(dist, name) for name in names}

    class Nothing:
        def wait(self) -> None:
            pass

    def skip(*_: Any, **__: Any) -> Nothing:
        vars(dist).update(plain)
        return Nothing()

    vars(dist).update(dict.fromkeys(names, skip))
