"""What is lost and what fails: who is charged for it, and whether the run goes on.

A failure of the group charges one of the budgets in `control.budget`, or leads to a leaner layout
(`control.memory`), and the group is fenced; nothing else is decided here.
"""

from __future__ import annotations

from dataclasses import replace

from elastictrain.control.budget import Blame, blame
from elastictrain.control.decisions import Decision, fence, give_up
from elastictrain.control.gathering import proceed
from elastictrain.control.memory import relieve, tell_change
from elastictrain.control.state import State
from elastictrain.control.vocabulary import StopWorker, Warn
from elastictrain.events import Cause

REMEMBERED = 100
"""Failures that decisions look back on."""
REST_S = 600.0
"""How long no worker is started where too many in a row did not come up, while the run trains without."""


def lose_worker(state: State, name: str, cause: Cause, step: int, now: float) -> Decision:
    """A worker's process is gone, or never came up."""
    starting = state.workers[name].state == "starting"
    state = _without(_failed_at(state, {state.workers[name].node}, now), {name})
    if name in state.members and state.phase in ("forming", "running"):
        if cause.kind == "oom" and state.phase == "running":
            return lack_memory(state, cause, step, own=False, now=now)
        return _charge(state, blame(cause), cause, now)
    return _lose_start(state, cause, now) if starting else proceed(state, now)


def lose_node(state: State, node: str, cause: Cause, now: float) -> Decision:
    """A node is gone, with all of its workers."""
    gone = {name for name, worker in state.workers.items() if worker.node == node}
    if node not in state.draining:
        state = _failed_at(state, {node}, now)
    state = replace(_without_node(state, node), losses_at=(*state.losses_at, now)[-REMEMBERED:])
    if gone & set(state.members) and state.phase in ("forming", "running"):
        return _charge(state, blame(cause), cause, now)
    return _look_again(state, now)


def refuse_node(state: State, node: str, now: float) -> Decision:
    """Nothing is lost with a node that was never used."""
    return proceed(_without_node(state, node), now)


def lose_keeper(state: State, node: str, cause: Cause, now: float) -> Decision:
    """The ranks there can't commit any more: a new generation, as soon as they have their next keeper."""
    there = {name for name, worker in state.workers.items() if worker.node == node}
    workers = {n: replace(w, state="starting") if n in there else w for n, w in state.workers.items()}
    state = replace(state, workers=workers)
    if there & set(state.members) and state.phase in ("forming", "running"):
        return _charge(state, blame(cause), cause, now)
    return _look_again(state, now)


def _look_again(state: State, now: float) -> Decision:
    """Memory is gone somewhere, and the state to go on from may have been there: others may hold it, or storage."""
    if state.phase == "gathering" and state.restore.source == "memory":
        return fence(state, state.cause)
    return proceed(state, now)


def fail_forming(state: State, name: str | None, cause: Cause, now: float) -> Decision:
    """A worker whose engine can't be rebuilt is replaced, not the job; the very same error again ends the run.

    One whose engine finds no memory is too, since nobody knows what the half-built one holds; the layout is to blame.
    """
    guilty = {name} & state.workers.keys() if name is not None else set()
    if guilty and cause.kind == "oom":
        state, actions = lack_memory(_without(state, guilty), cause, state.restore.step + 1, own=True, now=now)
        return state, [*(StopWorker(n) for n in sorted(guilty)), *actions]
    state = _without(_failed_at(state, {state.workers[n].node for n in guilty}, now), guilty)
    if cause.kind == "exception":
        error = (state.restore.step, f"forming: {cause.message}")
        if error == state.last_error:
            return give_up(state, cause, f"The group could not be formed at step {error[0]}, twice for the same error.")
        state = replace(state, last_error=error)
    state, actions = _charge(state, "engine", cause, now)
    return state, [*(StopWorker(n) for n in sorted(guilty)), *actions]


def fail_corrupted(state: State, names: tuple[str, ...], trusted_step: int, cause: Cause, now: float) -> Decision:
    """Memory that changes by itself may do so again: its workers are replaced, and what they did since is forgotten."""
    nodes = {state.workers[name].node for name in names if name in state.workers}
    state = _without(_failed_at(state, nodes, now), {*names})
    state = replace(state, trusted={**state.trusted, state.generation: trusted_step})
    state, actions = _charge(state, "corruption", cause, now)
    return state, [*(StopWorker(name) for name in names), *actions]


def fail_raised(state: State, cause: Cause, step: int, now: float) -> Decision:
    """A rank's own code raised: once may be the machine, twice at the same step is not."""
    if cause.kind == "bad_loss":  # a verdict, not an accident: to try again is not what was asked for
        return give_up(state, cause)
    error = (step, cause.error_type)
    if error == state.last_error and cause.kind == "exception":
        return give_up(state, cause, f"It was raised at step {step} again, so it is no accident.")
    return _charge(replace(state, last_error=error), blame(cause), cause, now)


def fail_broken(state: State, cause: Cause, now: float) -> Decision:
    """The group can't go on, and nobody is known to be dead."""
    return _charge(state, "hang" if cause.kind == "hang" else "engine", cause, now)


def lack_memory(state: State, cause: Cause, step: int, own: bool, now: float) -> Decision:
    """Memory ran out in this step: fence, and go on as `control.memory` says."""
    relief = relieve(state, step, own)
    if relief is None:
        return give_up(state, cause)
    relieved, charged = relief
    after, actions = _charge(relieved, "memory", cause, now) if charged else fence(relieved, cause.message)
    return after, [*tell_change(state, relieved, step), *actions] if after.phase != "ended" else actions


def _charge(state: State, to: Blame, cause: Cause, now: float) -> Decision:
    """Fence, and pause before the next group if there were several failures in a row; or end the run."""
    budgets, best = state.policy.budgets, state.account.best_step
    account = state.account.charge(to)
    state = replace(state, account=account, start_failures=0, start_at=0.0)
    if account.charged[to] > budgets.allowed(to):
        return give_up(state, cause, budgets.spent(to, f"since step {best} was reached"))
    pause_s = budgets.pause_s(account.failures)
    state, actions = fence(replace(state, restart_at=now + pause_s), cause.message)
    if pause_s:
        words = f"{account.failures} failures in a row without a new step: the next try is in {pause_s:.3g} s"
        actions.append(Warn("backoff", words))
    return state, actions


def _lose_start(state: State, cause: Cause, now: float) -> Decision:
    budgets, failures = state.policy.budgets, state.start_failures + 1
    over = failures > budgets.allowed("start")
    if over and state.phase == "gathering" and not state.size:
        of_user = f"{failures} workers in a row raised it while they came up, so it is no accident."
        spent = budgets.spent("start", "with none coming up between them")
        return give_up(state, cause, of_user if cause.kind == "exception" else spent)
    state = replace(state, start_failures=0 if over else failures, start_at=now + REST_S * over)
    state, actions = proceed(state, now)
    if over:
        words = f"{failures} workers in a row did not come up: no more are started for {REST_S / 60:.0f} minutes"
        actions = [Warn("start", words), *actions]
    return state, actions


def _failed_at(state: State, nodes: set[str], now: float) -> State:
    return replace(state, failed_at=(*state.failed_at, *((now, node) for node in sorted(nodes)))[-REMEMBERED:])


def _without_node(state: State, node: str) -> State:
    there = {name for name, worker in state.workers.items() if worker.node == node}
    left = {name: slots for name, slots in state.nodes.items() if name != node}
    return replace(_without(state, there), nodes=left, draining=state.draining - {node})


def _without(state: State, workers: set[str]) -> State:
    return replace(state, workers={name: worker for name, worker in state.workers.items() if name not in workers})
