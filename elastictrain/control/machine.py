"""The state machine: `advance(state, observation, now) -> (state, actions)`.

    gathering --enough warm workers--> forming --Formed--> running --last step--> ended
        ^                                 |                    |
        +------Fenced------ fencing <-----+---- a failure, or a resize

Invariants (tested by properties): a generation is formed only after everything older was fenced, so one at most
writes; a failure adds a strike, or makes the micro-batch smaller, and only a new step clears strikes, so a run ends or
makes progress; whoever waits has a deadline. Each decision is linear in the number of workers.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

from elastictrain.control.leaving import dismiss, leaving_members, outlook, parting_words, ready_to_part, take_notice
from elastictrain.control.memory import relieve, tell_change, way_out
from elastictrain.control.placement import assign_ranks, wanted_workers
from elastictrain.control.resize import QUARANTINE_S, growth_pays, nodes_to_avoid
from elastictrain.control.state import Policy, State, Worker
from elastictrain.control.vocabulary import (
    Action,
    End,
    Fence,
    Fenced,
    Form,
    Formed,
    FormFailed,
    KeeperLost,
    Leaving,
    NodeLost,
    NodesJoined,
    Observation,
    Pause,
    Paused,
    PeersBroken,
    RankRaised,
    Readmit,
    ReleaseNode,
    RestorePoint,
    Save,
    StartWorker,
    StateCorrupted,
    StepDone,
    StopAsked,
    StopWorker,
    Tick,
    Warn,
    WorkerDied,
    WorkerUp,
)
from elastictrain.events import Cause

REMEMBERED = 100
"""Failures that decisions look back on."""
NOTICE_S = 5.0
"""A shortage of workers that lasts so long is told."""

Decision = tuple[State, list[Action]]


def begin(policy: Policy, restore: RestorePoint, generation: int, cause: str, now: float) -> State:
    """The state of an attempt that starts (or resumes) from `restore`, its first generation being `generation`."""
    largest = policy.micro_batches[0]
    return State(policy, "gathering", generation, restore, cause, now, restore.step, restore.step, largest)


def advance(state: State, seen: Observation, now: float) -> Decision:
    """One decision. Observations of old generations, unknown workers and ended runs change nothing."""
    current = state.phase in ("forming", "running") and getattr(seen, "generation", None) == state.generation
    match seen:
        case _ if state.phase == "ended":
            return state, []
        case NodesJoined(slots):
            return _proceed(replace(state, nodes={**state.nodes, **slots}), now)
        case NodeLost(node, cause):
            return _lose_node(state, node, cause, now)
        case KeeperLost(node, cause):
            return _lose_keeper(state, node, cause, now)
        case WorkerUp(name) if name in state.workers:
            workers = {**state.workers, name: replace(state.workers[name], state="ready")}
            return _proceed(replace(state, workers=workers, start_failures=0), now)
        case WorkerDied(name, cause, step) if name in state.workers:
            return _lose_worker(state, name, cause, step, now)
        case Leaving() if seen.worker in state.workers or seen.node in state.nodes:
            return _leave(state, seen, now)
        case RankRaised(_, _, step, cause) if current and cause.kind == "oom":
            return _lack_memory(state, cause, step, own=True)
        case RankRaised(_, _, step, cause) if current:
            return _fail(state, cause, step)
        case PeersBroken(_, cause) if current:
            return _fail(state, cause, 0)
        case StateCorrupted(_, names, trusted_step, cause) if current:
            return _fail_corrupted(state, names, trusted_step, cause)
        case FormFailed(_, name, cause) if current:
            return _fail_forming(state, name, cause)
        case Formed() if current:
            return replace(state, phase="running"), []
        case StepDone(_, step) if current and step > state.committed_step:
            return _commit(state, step, now)
        case Paused() if current and state.pausing:
            return _fence(state, parting_words(state) or f"resize from {len(state.members)} workers")
        case Fenced(generation, restore) if state.phase == "fencing" and generation == state.generation:
            fenced = replace(state, phase="gathering", restore=restore, committed_step=restore.step, since=now)
            return _proceed(fenced, now)
        case StopAsked(reason):
            return replace(state, phase="ended"), [End("stopped", Cause("stop", reason))]
        case Tick():
            return _proceed(state, now)
    return state, []


def _commit(state: State, step: int, now: float) -> Decision:
    if state.paced_from is None:
        state = replace(state, paced_from=(step, now), pause_s=now - state.since)
    state = replace(state, committed_step=step, phase="running")
    if step > state.best_step:
        state = replace(state, best_step=step, strikes=0)
    if step >= state.policy.steps:
        return replace(state, phase="ended"), [End("complete")]
    released = state.draining - {worker.node for worker in state.workers.values()}
    releases = [ReleaseNode(node, QUARANTINE_S if node in state.quarantined else 0.0) for node in sorted(released)]
    left_alone = state.left_alone or bool(released & state.quarantined)
    state = replace(state, draining=state.draining - released, quarantined=state.quarantined - released)
    state = replace(state, left_alone=left_alone)
    state, warnings = _quarantine(state, now)
    state, actions = _proceed(state, now)
    return state, [*releases, *warnings, *actions]


def _quarantine(state: State, now: float) -> Decision:
    """Have nodes leave on which too much breaks."""
    warnings = list[Action]()
    for node in sorted(nodes_to_avoid(state.failed_at, state.nodes, len(state.members), now)):
        message = f"node {node} fails again and again: it is left alone for {QUARANTINE_S / 60:.0f} minutes"
        state = take_notice(state, Leaving(f"node {node} is quarantined", inf, node=node))
        state = replace(state, quarantined=state.quarantined | {node})
        warnings.append(Warn("quarantine", message))
    return state, warnings


def _leave(state: State, seen: Leaving, now: float) -> Decision:
    state, actions = _proceed(take_notice(state, seen), now)
    return state, [outlook(state, seen, now), *actions]


def _lose_worker(state: State, name: str, cause: Cause, step: int, now: float) -> Decision:
    starting, node = state.workers[name].state == "starting", state.workers[name].node
    state = replace(
        state,
        workers={n: w for n, w in state.workers.items() if n != name},
        failed_at=(*state.failed_at, (now, node))[-REMEMBERED:],
    )
    if name in state.members and state.phase in ("forming", "running"):
        if cause.kind == "oom" and state.phase == "running":
            return _lack_memory(state, cause, step, own=False)
        return _fail(state, cause, step)
    if starting:
        state = replace(state, start_failures=state.start_failures + 1)
        if state.start_failures > state.policy.max_failures and state.phase == "gathering" and not state.size:
            return _give_up(state, cause)
    return _proceed(state, now)


def _lose_node(state: State, node: str, cause: Cause, now: float) -> Decision:
    gone = {name for name, worker in state.workers.items() if worker.node == node}
    state = replace(
        state,
        nodes={n: slots for n, slots in state.nodes.items() if n != node},
        losses_at=(*state.losses_at, now)[-REMEMBERED:],
        draining=state.draining - {node},
        workers={name: worker for name, worker in state.workers.items() if name not in gone},
    )
    if gone & set(state.members) and state.phase in ("forming", "running"):
        return _fail(state, cause, 0)
    if state.phase == "gathering" and state.restore.source == "memory":
        return _fence(state, state.cause)  # the state may have been there: look again
    return _proceed(state, now)


def _lose_keeper(state: State, node: str, cause: Cause, now: float) -> Decision:
    """The ranks there can't commit any more: a new generation, as soon as they have their next keeper."""
    there = {name for name, worker in state.workers.items() if worker.node == node}
    workers = {n: replace(w, state="starting") if n in there else w for n, w in state.workers.items()}
    state = replace(state, workers=workers)
    if there & set(state.members) and state.phase in ("forming", "running"):
        return _fail(state, cause, 0)
    return _proceed(state, now)


def _fail_forming(state: State, name: str | None, cause: Cause) -> Decision:
    """A worker whose engine can't be rebuilt is replaced, not the job."""
    if name is None or name not in state.workers:
        return _fail(state, cause, 0)
    state = replace(state, workers={n: w for n, w in state.workers.items() if n != name})
    state, actions = _fail(state, cause, 0)
    return state, [StopWorker(name), *actions]


def _fail_corrupted(state: State, names: tuple[str, ...], trusted_step: int, cause: Cause) -> Decision:
    """Memory that changes by itself may do so again: its workers are replaced, and what they did since is forgotten."""
    state = replace(
        state,
        workers={n: w for n, w in state.workers.items() if n not in names},
        trusted={**state.trusted, state.generation: trusted_step},
    )
    state, actions = _fail(state, cause, 0)
    return state, [*(StopWorker(name) for name in names), *actions]


def _fail(state: State, cause: Cause, step: int) -> Decision:
    """The current generation can't go on: fence it, unless the run has failed too often."""
    state = replace(state, strikes=state.strikes + 1)
    if cause.kind == "exception":
        error = (step, cause.error_type)
        if error == state.last_error:
            return _give_up(state, cause)
        state = replace(state, last_error=error)
    if cause.kind == "bad_loss":  # a verdict, not an accident: to try again is not what was asked for
        return _give_up(state, cause)
    if state.strikes > state.policy.max_failures:
        return _give_up(state, cause)
    return _fence(state, cause.message)


def _lack_memory(state: State, cause: Cause, step: int, own: bool) -> Decision:
    """Memory ran out in this step: fence, and go on as `control.memory` says."""
    relieved = relieve(state, step, own)
    if relieved is None:
        return _give_up(state, cause)
    fenced, actions = _fence(relieved, cause.message)
    return fenced, [*tell_change(state, relieved, step), *actions]


def _fence(state: State, cause: str) -> Decision:
    survivors = tuple(name for name in state.members if name in state.workers)
    state = replace(
        state, phase="fencing", generation=state.generation + 1, cause=cause, pausing=False, paced_from=None
    )
    return state, [Fence(state.generation, survivors, state.trusted)]


def _give_up(state: State, cause: Cause) -> Decision:
    return replace(state, phase="ended"), [End("failed", way_out(state, cause))]


def _proceed(state: State, now: float) -> Decision:
    """Keep enough workers coming; form a group, or a larger one, as soon as that is the best to do."""
    state, dismissals = dismiss(state)
    state, actions = _replenish(state)
    if state.phase == "gathering":
        state, more = _gather(state, now)
    elif state.phase == "running" and not state.pausing and (_may_grow(state, now) or ready_to_part(state, now)):
        state, more = replace(state, pausing=True), [Pause(state.generation)]
    else:
        more = []
    return state, [*dismissals, *actions, *more]


def _may_grow(state: State, now: float) -> bool:
    size, larger = len(state.members), state.seated or 0
    return larger > size and growth_pays(size, larger, state.pause_s, state.losses_at, now)


def _gather(state: State, now: float) -> Decision:
    waited = now - state.since
    largest = state.size == state.policy.world_sizes[-1]
    # after a notice: who could have waited for a replacement has done so while it trained
    late = state.leaving or waited >= state.policy.replace_timeout_s
    if state.size and (largest or not state.coming or late):
        nodes = {name: state.workers[name].node for name in state.ready}
        members = assign_ranks(state.size, nodes, state.members)
        state = replace(state, phase="forming", members=members, leaving=False)
        return state, [Form(state.generation, members, state.restore, state.cause, state.micro_batch)]
    fewest, room = state.policy.world_sizes[0], sum(state.nodes.values())
    if state.leaving:
        message = f"fewer than {fewest} workers stay: the newest step is made durable, and the run waits for room"
        return replace(state, leaving=False), [Save(), Warn("preemption", message)]
    if waited >= state.policy.wait_timeout_s:
        missing = (
            f"{len(state.ready)} workers are ready and {fewest} are needed; the cluster has room for {room}. Waited "
            f"{waited:.0f} s (elastic.wait_timeout_s). Add nodes, or lower elastic.min_workers or "
            f"elastic.cpus_per_worker."
        )
        return _give_up(state, Cause("resources", missing))
    if not state.size and not state.coming and waited > NOTICE_S and state.left_alone:
        return replace(state, left_alone=False), [Readmit()]
    if not state.size and not state.coming and waited > NOTICE_S and "waiting" not in state.warned:
        message = f"waiting for room for {fewest} workers; the cluster has room for {room}"
        return replace(state, warned=state.warned | {"waiting"}), [Warn("waiting", message)]
    return state, []


def _replenish(state: State) -> Decision:
    """Start missing workers; standbys only once the generation has made a step, so that they never delay one."""
    if state.start_failures > state.policy.max_failures:
        return state, []
    leaving = [state.workers[name] for name in leaving_members(state)]
    settled = state.phase == "running" and state.committed_step > state.restore.step and not leaving
    target = state.policy.world_sizes[-1] + (state.policy.standby if settled else 0) + len(leaving)
    freed = sum(worker.reserved and worker.node in state.nodes for worker in leaving)
    orders = wanted_workers(
        nodes=state.nodes,
        workers={name: (worker.node, worker.reserved) for name, worker in state.workers.items()},
        target=target,
        unreserved=state.policy.standby + freed if state.policy.unreserved_standby else 0,
    )
    workers, actions = dict(state.workers), list[Action]()
    for number, (node, reserved) in enumerate(orders, start=state.next_worker):
        workers[f"worker-{number}"] = Worker(node, reserved)
        actions.append(StartWorker(f"worker-{number}", node, reserved))
    short = target - len(workers)
    if settled and short > 0 and "room" not in state.warned:
        state = replace(state, warned=state.warned | {"room"})
        actions.append(Warn("room", f"the cluster has no room for {short} more of the workers and standbys configured"))
    return replace(state, workers=workers, next_worker=state.next_worker + len(orders)), actions
