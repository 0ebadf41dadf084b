"""The state machine: `advance(state, observation, now) -> (state, actions)`.

    gathering --enough warm workers--> forming --Formed--> running --last step--> ended
        ^                                 |                    |
        +------Fenced------ fencing <-----+---- a failure, or a resize

Invariants (tested by properties): a generation is formed only after everything older was fenced, so one at most
writes; a failure is charged to a finite budget, or leads to the next of finitely many plans, and only new steps forgive
it, so a run ends or makes progress; whoever waits has a deadline. Each decision is linear in the number of workers.

What is lost is dealt with in `failing`, the way to the next group in `gathering`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import inf

from elastictrain.control.budget import Account
from elastictrain.control.decisions import Decision, fence
from elastictrain.control.failing import (
    fail_broken,
    fail_corrupted,
    fail_forming,
    fail_raised,
    lack_memory,
    lose_keeper,
    lose_node,
    lose_worker,
    refuse_node,
)
from elastictrain.control.gathering import proceed
from elastictrain.control.leaving import give_up_slots, outlook, parting_words, take_notice
from elastictrain.control.resize import QUARANTINE_S, nodes_to_avoid
from elastictrain.control.state import Policy, State
from elastictrain.control.vocabulary import (
    Action,
    End,
    Fenced,
    Formed,
    FormFailed,
    KeeperLost,
    Leaving,
    NodeLost,
    NodeRefused,
    NodesJoined,
    Observation,
    Paused,
    PeersBroken,
    RankRaised,
    ReleaseNode,
    RestorePoint,
    StateCorrupted,
    StepDone,
    StopAsked,
    Tick,
    Warn,
    WorkerDied,
    WorkerUp,
)
from elastictrain.events import Cause


def begin(
    policy: Policy,
    restore: RestorePoint,
    generation: int,
    cause: str,
    now: float,
    trusted: Mapping[int, int] | None = None,
) -> State:
    """The state of an attempt that starts (or resumes) from `restore`, its first generation being `generation`.

    `trusted` says up to which step earlier generations' states may be used, where memory still has some.
    """
    step = restore.step
    return State(policy, "gathering", generation, restore, cause, now, step, Account(step, step), trusted=trusted or {})


def advance(state: State, seen: Observation, now: float) -> Decision:
    """One decision. Observations of old generations, unknown workers and ended runs change nothing."""
    current = state.phase in ("forming", "running") and getattr(seen, "generation", None) == state.generation
    match seen:
        case _ if state.phase == "ended":
            return state, []
        case NodesJoined(slots):
            joined = replace(give_up_slots(state, slots, now), start_failures=0, start_at=0.0)
            return proceed(joined, now)
        case NodeLost(node, cause):
            return lose_node(state, node, cause, now)
        case NodeRefused(node):
            return refuse_node(state, node, now)
        case KeeperLost(node, cause):
            return lose_keeper(state, node, cause, now)
        case WorkerUp(name) if name in state.workers:
            workers = {**state.workers, name: replace(state.workers[name], state="ready")}
            return proceed(replace(state, workers=workers, start_failures=0), now)
        case WorkerDied(name, cause, step) if name in state.workers:
            return lose_worker(state, name, cause, step, now)
        case Leaving() if seen.worker in state.workers or seen.node in state.nodes:
            return _leave(state, seen, now)
        case RankRaised(_, _, step, cause) if current and cause.kind == "oom":
            return lack_memory(state, cause, step, own=True, now=now)
        case RankRaised(_, _, step, cause) if current:
            return fail_raised(state, cause, step, now)
        case PeersBroken(_, cause) if current:
            return fail_broken(state, cause, now)
        case StateCorrupted(_, names, trusted_step, cause) if current:
            return fail_corrupted(state, names, trusted_step, cause, now)
        case FormFailed(_, name, cause) if current:
            return fail_forming(state, name, cause, now)
        case Formed() if current:
            return _warn_of_one_node(replace(state, phase="running"))
        case StepDone(_, step) if current and step > state.committed_step:
            return _commit(state, step, now)
        case Paused() if current and state.pausing:
            size = len(state.members)
            changed = (
                f"resize from {size} worker{'s' * (size > 1)}"
                if (state.seated or 0) > size
                else "ranks move to slots of their own"
            )
            return fence(state, parting_words(state) or changed)
        case Fenced(generation, restore) if state.phase == "fencing" and generation == state.generation:
            account = state.account.restore(restore.step)
            fenced = replace(state, restore=restore, committed_step=restore.step, account=account)
            return proceed(replace(fenced, phase="gathering", since=now), now)
        case StopAsked(reason):
            return replace(state, phase="ended"), [End("stopped", Cause("stop", reason))]
        case Tick():
            return proceed(state, now)
    return state, []


def _warn_of_one_node(state: State) -> Decision:
    """Say once that the copies of the state have no second node; one worker alone is nobody's cluster."""
    if len(state.nodes) != 1 or state.policy.world_sizes[-1] == 1 or "copies" in state.warned:
        return state, []
    (node,) = state.nodes
    message = (
        f"every copy of the state in memory is on node {node}, since there is no other: a lost worker costs nothing, a "
        "lost node the steps since the last durable checkpoint (checkpoint.every)"
    )
    return replace(state, warned=state.warned | {"copies"}), [Warn("copies", message)]


def _commit(state: State, step: int, now: float) -> Decision:
    if state.paced_from is None:
        state = replace(state, paced_from=(step, now), pause_s=now - max(state.since, state.restart_at))
    state = replace(state, committed_step=step, account=state.account.commit(step), phase="running")
    if step >= state.policy.steps:
        return replace(state, phase="ended"), [End("complete")]
    released = state.draining - {worker.node for worker in state.workers.values()}
    releases = [ReleaseNode(node, QUARANTINE_S if node in state.quarantined else 0.0) for node in sorted(released)]
    left_alone = state.left_alone or bool(released & state.quarantined)
    state = replace(state, draining=state.draining - released, quarantined=state.quarantined - released)
    state = replace(state, left_alone=left_alone)
    state, warnings = _quarantine(state, now)
    state, actions = proceed(state, now)
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
    state, actions = proceed(take_notice(state, seen), now)
    return state, [outlook(state, seen, now), *actions]
