"""What a decision is, and the two that several parts of the state machine come to: fence, and give up."""

from __future__ import annotations

from dataclasses import replace

from elastictrain.control.memory import way_out
from elastictrain.control.state import State
from elastictrain.control.vocabulary import Action, End, Fence
from elastictrain.events import Cause

Decision = tuple[State, list[Action]]


def fence(state: State, cause: str) -> Decision:
    """Nothing of this generation counts any more; the next is formed for this cause."""
    survivors = tuple(name for name in state.members if name in state.workers)
    state = replace(
        state, phase="fencing", generation=state.generation + 1, cause=cause, pausing=False, paced_from=None
    )
    return state, [Fence(state.generation, survivors, state.trusted)]


def give_up(state: State, cause: Cause, why: str = "") -> Decision:
    """The run ends with this cause, told with what else is to be said."""
    cause = way_out(state, cause)
    if why:
        cause = replace(cause, message=f"{cause.message.rstrip('.')}. {why}")
    return replace(state, phase="ended"), [End("failed", cause)]
