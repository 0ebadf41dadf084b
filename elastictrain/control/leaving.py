"""Preemption notices: workers and nodes that will be gone at a deadline leave at a step boundary before it.

A notice is no failure: nothing is lost, nothing is charged to a budget. A member that leaves trains on until its
replacement is warm, or until the deadline is so near that the group must go on smaller, or save its state and wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import inf

from elastictrain.control.state import Notice, State, Worker
from elastictrain.control.vocabulary import Action, Leaving, StopWorker, Warn

MARGIN_S = 10.0
"""Before the deadline, beside two steps: time for the pause, the fence, and a new group or a durable checkpoint."""
GIVEN_UP = "workers are given up to others"


def take_notice(state: State, seen: Leaving) -> State:
    """The state that knows of it; of two notices to one worker the earlier deadline counts."""
    notice = Notice(seen.cause, seen.deadline)

    def told(name: str, worker: Worker) -> Worker:
        earlier = worker.notice is not None and worker.notice.deadline <= seen.deadline
        meant = name == seen.worker or worker.node == seen.node
        return replace(worker, notice=notice) if meant and not earlier else worker

    workers = {name: told(name, worker) for name, worker in state.workers.items()}
    nodes = {node: slots for node, slots in state.nodes.items() if node != seen.node}
    draining = state.draining | {seen.node} if seen.node in state.nodes else state.draining
    state = replace(state, workers=workers, nodes=nodes, draining=draining)
    # between two groups, what the node holds in memory may be all there is
    parting = bool(leaving_members(state)) or (state.phase in ("fencing", "gathering") and seen.node in draining)
    return replace(state, leaving=state.leaving or parting)


def give_up_slots(state: State, slots: Mapping[str, int], now: float) -> State:
    """The state after these nodes were found to have fewer slots: who has none any more leaves at a step boundary.

    Those with the lowest ranks stay.
    """
    ranks = {name: rank for rank, name in enumerate(state.members)}
    order = sorted(state.workers, key=lambda name: ranks.get(name, len(ranks)))
    parting = set[str]()
    for node, now_has in slots.items():
        there = [n for n in order if state.workers[n].node == node and state.workers[n].notice is None]
        parting |= set(there[now_has:]) if now_has < state.nodes.get(node, 0) else set()
    gone = {name: replace(w, notice=Notice(GIVEN_UP, now, for_good=True)) for name, w in state.workers.items()}
    workers = {name: gone[name] if name in parting else worker for name, worker in state.workers.items()}
    state = replace(state, workers=workers, nodes={**state.nodes, **slots})
    return replace(state, leaving=state.leaving or bool(parting & leaving_members(state).keys()))


def leaving_members(state: State) -> dict[str, Notice]:
    """Workers of the current generation that have a notice."""
    members = state.members if state.phase in ("forming", "running") else ()
    return {m: w.notice for m in members if (w := state.workers.get(m)) is not None and w.notice is not None}


def dismiss(state: State) -> tuple[State, list[Action]]:
    """End the workers that leave and hold no rank; not while a fence may still need them."""
    if state.phase == "fencing":
        return state, []
    held = leaving_members(state)
    over = [name for name, worker in state.workers.items() if worker.notice is not None and name not in held]
    workers = {name: worker for name, worker in state.workers.items() if name not in over}
    return replace(state, workers=workers), [StopWorker(name) for name in over]


def ready_to_part(state: State, now: float) -> bool:
    """Whether the group should pause now because of members that leave: they can be replaced, or time is up."""
    notices = leaving_members(state).values()
    if not notices:
        return False
    urgent = now >= min(n.deadline for n in notices) - _margin_s(state, now)
    return urgent or (state.size or 0) >= len(state.members)


def parting_words(state: State) -> str:
    """Why the group is left, if because of notices."""
    return "; ".join(dict.fromkeys(notice.cause for notice in leaving_members(state).values()))


def outlook(state: State, seen: Leaving, now: float) -> Warn:
    """What the user is told of a notice: how long it leaves, and what is done about it."""
    concerned = [m for m in leaving_members(state) if m == seen.worker or state.workers[m].node == seen.node]
    if not concerned:
        plan = "it holds no rank"
    elif (state.size or 0) >= len(state.members):
        plan = "standbys take over at the next step boundary"
    elif state.coming and sum(state.nodes.values()) >= len(state.members):
        plan = "a replacement is started, and takes over when it is warm"
    else:
        before = f"{_margin_s(state, now):.0f} s before that"
        plan = f"there is no room for a replacement; if none comes, the group parts with it {before}"
    left = f", {max(seen.deadline - now, 0):.0f} s left" if seen.deadline < inf else ""
    return Warn("preemption", f"{seen.cause}{left}: {plan}")


def _margin_s(state: State, now: float) -> float:
    if state.paced_from is None:
        return MARGIN_S
    step, at = state.paced_from
    return MARGIN_S + 2 * (now - at) / max(state.committed_step - step, 1)
