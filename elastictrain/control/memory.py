"""Memory that ran out: when the next generation takes a leaner layout, and when the run ends.

A rank whose own allocation failed lives and says so. What it had to hold follows from the layout, so the next
generation gets the next of `Policy.plans` that needs clearly less with as many workers: a smaller micro-batch, a higher
ZeRO stage, recomputation or another split, at the same global batch. That costs nothing: plans are finite. With nothing
leaner left it is a failure like any other, and the run ends when the same step runs out of memory again.

A worker that the kernel or Ray killed for the node's sake proves less. Host memory is shared: the victim is the largest
process, not the one that grew, and on GPUs the activations are not even there. So the first time it is a lost worker
like any other, replaced at the same layout with the same losses. If the same step is killed again, nothing else having
helped, a leaner layout is tried too: on CPUs it is the cure, elsewhere it does no harm. Each is charged, so a node that
is too small for other reasons ends the run when `elastic.budgets.memory` is spent.

A rank whose engine finds no memory while the group forms says so too, and is treated as the first; its process is
replaced.
"""

from __future__ import annotations

from dataclasses import replace

from elastictrain.control.state import State
from elastictrain.control.vocabulary import Warn
from elastictrain.events import Cause
from elastictrain.plan.auto import relief
from elastictrain.plan.layout import Layout

_FIELDS = {
    "zero_stage": "ZeRO stage",
    "pp": "pipeline stages",
    "tp": "tensor parallelism",
    "sp": "sequence parallelism",
    "ep": "expert parallelism",
    "offload": "offload",
}
"""Of `parallel`, what a leaner layout may have otherwise, in words."""


def relieve(state: State, step: int, own: bool) -> tuple[State, bool] | None:
    """The state to go on with after `step` ran out of memory, and whether that is charged; None: the run is to end.

    `own` says that an allocation of the rank's own failed; else its process was killed.
    """
    error = (step, "oom" if own else "oom kill")
    again = error == state.last_error
    leaner = relief(state.policy.plans, state.rung, len(state.members)) if own or again else None
    if own and again and leaner is None:
        return None
    relieved = replace(state, rung=state.rung if leaner is None else leaner, last_error=error)
    return relieved, leaner is None or not own


def tell_change(before: State, after: State, step: int) -> list[Warn]:
    """What the user should know of a layout that was made leaner."""
    size = len(before.members)
    was, now = before.choice(size).layout, after.choice(size).layout
    if now == was:
        return []
    changes, fields = _changes(was, now)
    message = (
        f"step {step} ran out of memory with {was}: the run goes on with {', '.join(changes)}, so with the same global "
        f"batch and the same samples. Set {' '.join(fields)} to have it from the start."
    )
    return [Warn("memory", message)]


def _changes(was: Layout, now: Layout) -> tuple[list[str], list[str]]:
    """What is different, in words and as the config's fields."""
    told, fields = list[str](), list[str]()
    if now.micro_batch != was.micro_batch:
        told.append(
            f"micro-batch {now.micro_batch} in place of {was.micro_batch} and as much more gradient accumulation"
        )
        fields.append(f"train.micro_batch={now.micro_batch}")
    if now.recompute != was.recompute:
        told.append(
            "no activation checkpointing" if now.recompute == "none" else f"{now.recompute} activation checkpointing"
        )
        fields.append(f"train.activation_checkpointing={now.recompute}")
    for name, word in _FIELDS.items():
        value = getattr(now, name)
        if value != getattr(was, name):
            told.append(f"{word} {value}")
            fields.append(f"parallel.{name}={value}")
    return told, fields


def way_out(state: State, cause: Cause) -> Cause:
    """The cause of a run's end; for a lack of memory, with what can be done about it."""
    if cause.kind != "oom":
        return cause
    if not state.members:
        return cause
    layout = state.choice(len(state.members)).layout
    ways = [f"a smaller train.micro_batch (now {layout.micro_batch})"] if layout.micro_batch > 1 else []
    ways += [] if layout.recompute == "full" else ["train.activation_checkpointing=full"]
    ways += ["a higher parallel.zero_stage"] if layout.zero_stage < 3 and layout.replica_size == 1 else []
    message = (
        f"{cause.message} (step {state.committed_step + 1}, layout {layout}, micro-batch {layout.micro_batch}). What "
        f"needs less memory: {', '.join([*ways, 'more workers'])}, or a smaller model or data.seq_len."
    )
    return replace(cause, message=message)
