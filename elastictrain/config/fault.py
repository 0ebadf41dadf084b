"""Planned faults."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from elastictrain.config.section import Section

FaultKind = Literal[
    "kill", "segfault", "exit", "exception", "oom", "nan", "bitflip", "stop", "loop", "skip", "slow", "preempt"
]
FaultPhase = Literal["forward", "backward", "update", "snapshot"]
FaultTarget = Literal["weights", "optimizer"]


class Fault(Section):
    """One planned fault: for demos, game days and tests."""

    at: int = Field(ge=1)
    """Step in which it strikes."""
    rank: int = Field(default=0, ge=0)
    """Rank that it strikes."""
    kind: FaultKind = "kill"
    """kill (SIGKILL), segfault (SIGSEGV), exit (os._exit(1)), exception (raised in the model's forward pass), oom (so
    too, as torch does when an allocation fails: each fault halves the micro-batch once), nan (the loss of its first
    micro-batch becomes NaN, whatever the phase), bitflip (one bit of the rank's state changes, which is found before
    the next update if the phase is forward or backward), stop (SIGSTOP), loop (compute for ever), skip (leave out the
    next collective), slow (from now on, `seconds` more in each forward and backward pass) or preempt (SIGTERM: the
    worker leaves at a step boundary)."""
    phase: FaultPhase = "backward"
    """Where in the step: before the forward or backward pass, the optimizer update, or the snapshot."""
    seconds: float = Field(default=0.1, gt=0)
    """Of kind slow."""
    where: FaultTarget = "weights"
    """Of kind bitflip: it strikes the rank's weights, or its masters and moments."""
    repeat: bool = False
    """Strike every time that the step is tried, not only the first: a bug, not an accident."""
