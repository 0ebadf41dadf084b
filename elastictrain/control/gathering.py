"""Towards the next group: keep enough workers coming, form a group or a larger one as soon as that is best, or wait.

Whoever waits has a deadline: for replacements, for room, and between restarts that got nowhere.
"""

from __future__ import annotations

from dataclasses import replace

from elastictrain.control.decisions import Decision, give_up
from elastictrain.control.leaving import dismiss, leaving_members, ready_to_part
from elastictrain.control.placement import assign_ranks, crowded, seat_together, wanted_workers
from elastictrain.control.resize import growth_pays
from elastictrain.control.state import State, Worker
from elastictrain.control.vocabulary import Action, Form, Pause, Readmit, Save, StartWorker, Warn
from elastictrain.events import Cause

NOTICE_S = 5.0
"""A shortage of workers that lasts so long is told."""
NODES_S = 30.0
"""And one so long while no node is there yet: what watches it comes up, which on a busy machine takes a while."""


def proceed(state: State, now: float) -> Decision:
    """Keep enough workers coming; form a group, or a larger one, as soon as that is the best to do."""
    state, dismissals = dismiss(state)
    state, actions = _replenish(state, now)
    if state.phase == "gathering":
        state, more = _gather(state, now)
    elif state.phase == "running" and not state.pausing and _changes(state, now):
        state, more = replace(state, pausing=True), [Pause(state.generation)]
    else:
        more = []
    return state, [*dismissals, *actions, *more]


def _changes(state: State, now: float) -> bool:
    return _may_grow(state, now) or _may_spread(state, now) or ready_to_part(state, now)


def _may_grow(state: State, now: float) -> bool:
    size, larger = len(state.members), state.seated or 0
    return larger > size and growth_pays(size, larger, state.pause_s, state.losses_at, now, state.since)


def _may_spread(state: State, now: float) -> bool:
    """Whether a pause pays to give ranks that share a slot, since their worker was a standby, slots of their own."""
    sharing = crowded([state.workers[name].node for name in state.members], state.nodes)
    if not sharing or not set(state.members) <= set(state.ready):
        return False
    nodes = _nodes_of_ready(state)
    spread = assign_ranks(len(state.members), nodes, state.members, state.nodes)
    seated, more = len(state.members) - sharing, sharing - crowded([nodes[name] for name in spread], state.nodes)
    return more > 0 and growth_pays(seated, seated + more, state.pause_s, state.losses_at, now, state.since)


def _nodes_of_ready(state: State) -> dict[str, str]:
    return {name: state.workers[name].node for name in state.ready}


def _gather(state: State, now: float) -> Decision:
    if now < state.restart_at and not state.leaving:
        return state, []
    waited, room = now - state.since, sum(state.nodes.values())
    # a worker without a slot of its own may be coming, which no larger world has room for
    largest = state.size == max((n for n in state.policy.world_sizes if n <= room), default=None)
    # after a notice: who could have waited for a replacement has done so while it trained
    late = state.leaving or waited >= state.policy.replace_timeout_s
    if state.size and (largest or not state.coming or late):
        nodes = _nodes_of_ready(state)
        members = assign_ranks(state.size, nodes, state.members, state.nodes)
        choice = state.choice(state.size)
        members = seat_together(
            members, nodes, choice.layout.tp * choice.layout.sp * choice.layout.ep
        )  # they talk all the time
        state = replace(state, phase="forming", members=members, leaving=False)
        return state, [Form(state.generation, members, state.restore, state.cause, choice)]
    fewest = state.policy.world_sizes[0]
    if state.leaving:
        message = f"fewer than {fewest} workers stay: the newest step is made durable, and the run waits for room"
        return replace(state, leaving=False), [Save(), Warn("preemption", message)]
    if waited >= state.policy.wait_timeout_s:
        missing = (
            f"{len(state.ready)} workers are ready and {fewest} are needed; the cluster has room for {room}. Waited "
            f"{waited:.0f} s (elastic.wait_timeout_s). Add nodes, or lower elastic.min_workers or "
            f"elastic.cpus_per_worker."
        )
        return give_up(state, Cause("resources", missing))
    if not state.size and not state.coming and waited > NOTICE_S and state.left_alone:
        return replace(state, left_alone=False), [Readmit()]
    patience_s = NOTICE_S if state.nodes else NODES_S
    if not state.size and not state.coming and waited > patience_s and "waiting" not in state.warned:
        message = f"waiting for room for {fewest} workers; the cluster has room for {room}"
        return replace(state, warned=state.warned | {"waiting"}), [Warn("waiting", message)]
    return state, []


def _replenish(state: State, now: float) -> Decision:
    """Start missing workers; standbys only once the generation has made a step, so that they never delay one."""
    if now < state.start_at and (state.size or state.phase != "gathering"):
        return state, []
    leaving = [state.workers[name] for name, notice in leaving_members(state).items() if not notice.for_good]
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
