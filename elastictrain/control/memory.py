"""Memory that ran out: when the next generation takes a smaller micro-batch, and when the run ends.

A rank whose own allocation failed lives and says so. Its activations grow with the micro-batch, so the next generation
gets the next smaller one at once, at the same global batch. That costs nothing: `Policy.micro_batches` is finite. With
nothing smaller left it is a failure like any other, and the run ends when the same step runs out of memory again.

A worker that the kernel or Ray killed for the node's sake proves less. Host memory is shared: the victim is the largest
process, not the one that grew, and on GPUs the activations are not even there. So the first time it is a lost worker
like any other, replaced at the same layout with the same losses. If the same step is killed again, nothing else having
helped, a smaller micro-batch is tried too: on CPUs it is the cure, elsewhere it does no harm. Each is charged, so a
node that is too small for other reasons ends the run when `elastic.budgets.memory` is spent.

While a group forms, no micro-batch has run: an engine that does not fit is a failure like any other.
"""

from __future__ import annotations

from dataclasses import replace

from elastictrain.control.state import State
from elastictrain.control.vocabulary import Warn
from elastictrain.events import Cause


def relieve(state: State, step: int, own: bool) -> tuple[State, bool] | None:
    """The state to go on with after `step` ran out of memory, and whether that is charged; None: the run is to end.

    `own` says that an allocation of the rank's own failed; else its process was killed.
    """
    error = (step, "oom" if own else "oom kill")
    again = error == state.last_error
    smaller = next((m for m in state.policy.micro_batches if m < state.micro_batch), None) if own or again else None
    if own and again and smaller is None:
        return None
    relieved = replace(state, micro_batch=smaller or state.micro_batch, last_error=error)
    return relieved, smaller is None or not own


def tell_change(before: State, after: State, step: int) -> list[Warn]:
    """What the user should know of a micro-batch that was made smaller."""
    was, now = before.micro_batch, after.micro_batch
    if now == was:
        return []
    message = (
        f"step {step} ran out of memory with micro-batch {was}: the run goes on with micro-batch {now} and as much "
        f"more gradient accumulation, so with the same global batch and the same samples. Set train.micro_batch={now} "
        f"to have it from the start."
    )
    return [Warn("memory", message)]


def way_out(state: State, cause: Cause) -> Cause:
    """The cause of a run's end; for a lack of memory, with what can be done about it."""
    if cause.kind != "oom":
        return cause
    smaller = "" if state.micro_batch == 1 else f"a smaller train.micro_batch (now {state.micro_batch}), "
    message = (
        f"{cause.message} (step {state.committed_step + 1}, micro-batch {state.micro_batch}). What needs less memory: "
        f"{smaller}train.activation_checkpointing=true, a higher parallel.zero_stage, more workers, or a smaller model "
        f"or data.seq_len."
    )
    return replace(cause, message=message)
