"""The supervisor: hears what happens, asks the state machine what to do, and does it. One thread, one loop.

It holds no policy: `control.machine` decides. `roster` knows who is there, `story` tells what happened, `regroup` makes
one generation of another, `saving` makes states durable. It lives in the driver's process and dies with it: the keepers
have the state, and the next driver goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import ray

from elastictrain.checkpoint.store import CheckpointStore
from elastictrain.config import TrainConfig
from elastictrain.control import vocabulary as v
from elastictrain.control.interval import SnapshotInterval
from elastictrain.control.machine import advance, begin
from elastictrain.control.policy import policy_of
from elastictrain.control.restore import is_trusted
from elastictrain.control.state import State
from elastictrain.events import Cause, Event, FaultInjected, SlotsHeld, WorkerStarted
from elastictrain.plan.auto import Plans
from elastictrain.plan.layout import Layout
from elastictrain.runtime.attribution import Attribution
from elastictrain.runtime.breakage import Breakage
from elastictrain.runtime.cluster import head_answers
from elastictrain.runtime.commits import CommitCollector
from elastictrain.runtime.fleet import Fleet
from elastictrain.runtime.forming import pair_keepers
from elastictrain.runtime.live import Live
from elastictrain.runtime.loads import LoadWatch
from elastictrain.runtime.protocol import (
    Evaluation,
    FaultAnnounced,
    KeeperEvent,
    KeeperTrouble,
    LeaveAsked,
    Outcome,
    SnapshotHeld,
    WorkerExited,
    WorkerInfo,
)
from elastictrain.runtime.regroup import Regroup
from elastictrain.runtime.replies import Replies
from elastictrain.runtime.resume import StartPoint
from elastictrain.runtime.roster import Roster
from elastictrain.runtime.saving import Saving
from elastictrain.runtime.story import Story
from elastictrain.runtime.vigil import Vigil
from elastictrain.state.tensors import ShardHeader
from elastictrain.status import RunState
from elastictrain.tracking.wording import place_text

TICK_S = 0.2

HEADLESS_S = 15.0
"""How long the last state may take when the cluster's head is gone: Ray leaves this process a minute in all."""


class Supervisor:
    """Runs one attempt: `run` returns how it ended; then `save_newest` makes the last state durable."""

    def __init__(
        self,
        config: TrainConfig,
        fleet: Fleet,
        data_folder: str,
        store: CheckpointStore,
        start: StartPoint,
        plans: Plans,
        live: Live,
        emit: Callable[[Event], None],
    ) -> None:
        self._config, self._fleet, self._data_folder = config, fleet, data_folder
        self._live, self._record = live, emit
        self._replies = Replies()
        self._roster = Roster(fleet, self._replies, self)
        commits = CommitCollector(start.restore.step, start.sample_chain, start.seen)
        self._story = Story(self._emit, commits, start.restore, start.layout, lost_steps=start.lost_steps)
        self._saving = Saving(config, fleet, store, self._story, self._emit)
        if start.remembered is not None:
            commits.recall(start.remembered.loss, start.remembered.scalars)
            self._saving.know(start.remembered.tensors)
            self._saving.layouts.update(start.remembered.layouts)
        self._state = self._first_state(start, plans)
        self._attribution = Attribution(fleet, self._story, lambda: self._state)
        self._blame = self._attribution.to_worker
        self._regroup = Regroup(config, self._roster, self._replies, self._story, self._saving, self)
        self._fired = set(start.fired)
        self._breakage = Breakage()
        self._paused: set[str] = set()
        """Members that have stopped for a pause."""
        self._said = {""}
        """What workers had to say, and what could not be done, told once each."""
        self._released: dict[str, float] = {}
        """Nodes that may go once no checkpoint is being written from there, and how long to leave them alone."""
        self._interval = SnapshotInterval(config.snapshot.every)
        self._vigil = Vigil(config.elastic, self._roster, self._replies, self._story, self.worker_lost, self._tell)
        self._loads = LoadWatch(fleet, self._replies, lambda: self._roster.memory_of(self._state.members), self._emit)
        self._stop: str | None = None
        self._ticked = 0.0
        self._slots = 0
        self._end: v.End | None = None

    def _first_state(self, start: StartPoint, plans: Plans) -> State:
        policy = policy_of(self._config, plans, self._fleet.on_gpus)
        trusted = start.remembered.trusted if start.remembered else None
        cause = "resume" if start.restore.step else "start"
        state = begin(policy, start.restore.point, start.generation, cause, time.time(), trusted)
        # by rule there is room for less than the config asks for, most of the time
        return state if self._fleet.allotment() is None else replace(state, warned=frozenset({"room"}))

    # -------------------------------------------------------------------------------------------------------- loop

    def run(self) -> v.End:
        """Train until the end, whatever happens; returns how it ended."""
        while self._end is None:
            self._roster.check()
            self._replies.wait(TICK_S)
            self._check()
            self._tick()
            self._live.publish(self._fleet, self._state, self._roster.progress, force=False)
        self._story.close()
        return self._end

    def _tick(self) -> None:
        # replies come many times a tick, and each asks control by itself if there is something to ask
        if time.monotonic() >= self._ticked + TICK_S:
            self._ticked = time.monotonic()
            self._tell(v.Tick() if self._stop is None else v.StopAsked(self._stop))

    def stop(self, reason: str) -> None:
        """Ask for a clean stop; callable from a signal handler."""
        self._stop = reason

    def _check(self) -> None:
        unexplained = self._breakage.unexplained()
        if unexplained is not None and self._grouped:
            at, cause = unexplained
            self._story.fail("engine_error", cause, generation=self._state.generation, at=at)
            self._tell(v.PeersBroken(self._state.generation, cause))
        for name in self._breakage.silent():
            self._roster.node_failed(name, "nobody answers at its raylet's port")
        self._regroup.check()
        self._saving.poll()
        self._loads.look(self._story.step)
        if self._released and not self._saving.busy:
            self._release()
        for problem in self._fleet.errands.take_failures():
            if problem not in self._said:
                self._said.add(problem)
                self._story.warn("cluster", problem)
        if self._fleet.num_slots != self._slots:
            self._slots = self._fleet.num_slots
            self._emit(SlotsHeld(time.time(), self._slots))

    def _emit(self, event: Event) -> None:
        self._live.fold(event)
        self._record(event)

    def _tell(self, seen: v.Observation) -> None:
        self._state, actions = advance(self._state, seen, time.time())
        for action in actions:
            self._perform(action)

    @property
    def _grouped(self) -> bool:
        return self._state.phase in ("forming", "running")

    # ------------------------------------------------------------------------------------------ facts, from the roster

    @property
    def recorded_step(self) -> int:
        """See `roster.Listener`."""
        return self._story.step

    def nodes_found(self, slots: dict[str, int]) -> None:
        """See `roster.Listener`."""
        self._tell(v.NodesJoined(slots))

    def node_refused(self, name: str, problem: str) -> None:
        """See `roster.Listener`."""
        self._story.warn("node", problem)
        self._tell(v.NodeRefused(name))

    def node_lost(self, name: str, cause: Cause) -> None:
        """See `roster.Listener`."""
        if name not in self._fleet.nodes:
            return
        workers = self._roster.forget_node(name)
        self._attribution.to_node("node_lost", name, workers, cause, self._breakage.first_sign)
        self._tell(v.NodeLost(name, cause))
        self._regroup.forget_node(name)

    def head_lost(self, message: str) -> None:
        """See `roster.Listener`."""
        way_out = "The run goes on when it is submitted again, to a cluster that is there."
        self._end = v.End("failed", Cause("resources", f"{message}. {way_out}"))

    def keeper_lost(self, name: str, pid: int, cause: Cause, at: float | None = None) -> None:
        """See `roster.Listener`."""
        workers = [w.name for w in self._fleet.workers.values() if w.node == name]
        self._attribution.to_node("keeper_lost", name, workers, cause, at, pid)
        self._tell(v.KeeperLost(name, cause))
        self._regroup.forget_node(name)

    def worker_adopted(self, name: str) -> None:
        """See `roster.Listener`."""
        self._tell(v.WorkerUp(name))

    def node_leaves(self, name: str, deadline: float) -> None:
        """See `roster.Listener`."""
        places = self._saving.places
        if name not in places and len(set(places)) == 1:  # it may be the only buddy
            pair_keepers(self._fleet, places)
        deadline = deadline or time.time() + self._config.elastic.preempt_grace_s
        self._tell(v.Leaving(f"node {name} is drained", deadline, node=name))

    def worker_ready(self, name: str, info: WorkerInfo, seconds: float) -> None:
        """See `roster.Listener`."""
        self._emit(WorkerStarted(time.time(), name, info.node, info.pid, seconds))
        if info.said not in self._said:
            self._said.add(info.said)
            self._story.warn("worker", f"{name} ({place_text(info.pid, info.node)}): {info.said}")
        self._tell(v.WorkerUp(name))

    def worker_lost(
        self, name: str, cause: Cause, at: float | None = None, step: int = 0, kind: str = "worker_lost"
    ) -> None:
        """See `roster.Listener`."""
        handle = self._fleet.workers.get(name)
        if handle is None:
            return
        if self._attribution.ranks([name]):
            self._blame(kind, name, cause, at or self._breakage.first_sign, step)
        elif self._end is None:
            pid = handle.info.pid if handle.info else 0
            self._story.warn("worker", f"{name} ({place_text(pid, handle.node)}): {cause.message}")
        self._roster.forget_worker(name)
        self._tell(v.WorkerDied(name, cause, step or self._story.step + 1))
        self._regroup.forget_worker(name)

    def keeper_event(self, event: KeeperEvent) -> None:
        """See `roster.Listener`."""
        match event:
            case SnapshotHeld(header):
                self.committed(header)
            case WorkerExited(worker) if worker in self._vigil.accused:
                pass  # ended for its hang, which is told when its stacks are there
            case WorkerExited(worker, at, cause, _, step, phase):
                if phase in ("snapshot", "idle"):
                    self._story.updated_step = max(self._story.updated_step, step)
                self.worker_lost(worker, cause, at, step)
            case FaultAnnounced(at, index, step, rank):
                self._fired.add(index)
                self._emit(FaultInjected(at, index, step, rank, self._config.faults[index].kind))
            case LeaveAsked(worker, at):
                deadline = at + self._config.elastic.preempt_grace_s
                self._tell(v.Leaving(f"{worker} leaves: SIGTERM", deadline, worker=worker))
            case KeeperTrouble(topic, message):
                self._story.warn(topic, message)

    def progress_told(self) -> None:
        """See `roster.Listener`."""
        self._vigil.look(self._state)

    # ------------------------------------------------------------------------------------------ facts, from the group

    def committed(self, header: ShardHeader) -> None:
        """See `regroup.Owner`."""
        if not is_trusted(self._state.trusted, header.generation, header.step):
            return
        steps, first = self._story.commit(header)
        if first:
            for node in self._fleet.nodes.values():
                node.keeper.release.remote(header.generation)
            self._fleet.disown()
        for event in steps:
            self._saving.committed(event)
            self._vigil.step(event.finished_at - event.begun_at)
            if self._interval.step(event.finished_at - event.begun_at, event.snapshot_stall_s):
                self._order(event.generation, str(self._interval.every))
                if self._interval.every > self._interval.told:
                    self._interval.told = self._interval.every
                    self._story.warn("snapshot", self._interval.words)
            self._tell(v.StepDone(event.generation, event.step))
        if steps:
            self._vigil.name_straggler(self._state)

    def training_ended(self, worker: str, generation: int, outcome: Outcome) -> None:
        """See `regroup.Owner`."""
        if generation != self._state.generation or not self._grouped:
            return
        cause = outcome.cause or Cause("unknown", outcome.kind)
        if outcome.kind == "raised":
            self._blame("oom" if cause.kind == "oom" else "user_error", worker, cause, outcome.at, outcome.step)
            self._tell(v.RankRaised(generation, worker, outcome.step, cause))
        elif outcome.kind == "peers_broken":
            self.broken(cause, outcome.at)
        elif outcome.kind == "paused":
            self._paused.add(worker)
            if self._paused >= set(self._state.members):  # a fence would cut off who is not there yet, and its step
                self._tell(v.Paused(generation))
        elif outcome.kind == "corrupted":
            guilty = tuple(self._state.members[rank] for rank in outcome.guilty)
            for name in guilty or (None,):
                self._blame("corrupted", name, cause, outcome.at, outcome.step)
            self._saving.distrust(outcome.trusted_step)
            self._tell(v.StateCorrupted(generation, guilty, outcome.trusted_step, cause))

    def broken(self, cause: Cause, at: float | None = None) -> None:
        """See `regroup.Owner`."""
        used = {self._fleet.workers[name].node for name in self._state.members if name in self._fleet.workers}
        raylets = {name: self._fleet.nodes[name].raylet for name in used if name in self._fleet.nodes}
        self._breakage.note(cause, at, raylets)

    def fenced(self, generation: int, point: v.RestorePoint) -> None:
        """See `regroup.Owner`."""
        self._tell(v.Fenced(generation, point))

    def formed(self, generation: int) -> None:
        """See `regroup.Owner`."""
        self._vigil.begin(generation, Layout.from_json(self._saving.layouts[generation]))
        self._tell(v.Formed(generation))

    def form_failed(self, worker: str | None, cause: Cause) -> None:
        """See `regroup.Owner`."""
        self._blame("engine_error", worker, cause)
        self._tell(v.FormFailed(self._state.generation, worker, cause))

    # ----------------------------------------------------------------------------------------------------- actions

    def _perform(self, action: v.Action) -> None:
        match action:
            case v.StartWorker(name, node, reserved):
                self._roster.start(name, node, reserved, self._data_folder)
            case v.StopWorker(name):
                self._roster.forget_worker(name)
            case v.Fence():
                self._breakage.clear()
                self._paused.clear()
                self._regroup.fence(action)
            case v.Form():
                self._regroup.form(action, frozenset(self._fired), self._interval.every)
            case v.Pause(generation):
                self._order(generation, "pause")
            case v.Save():
                self._saving.restored()
            case v.Readmit():
                self._fleet.banned.clear()
            case v.ReleaseNode(name, alone_s):
                self._released[name] = alone_s
            case v.Warn(topic, message):
                self._live.message = message
                self._story.warn(topic, message)
            case v.End():
                self._end = action

    def _order(self, generation: int, news: str) -> None:
        """Have rank 0 announce it to all; nobody does when this generation trains no more."""
        rank_0 = self._fleet.workers.get(self._state.members[0])
        if rank_0 is not None and generation == self._state.generation:
            rank_0.actor.order.remote(generation, news)

    def _release(self) -> None:
        for name in self._released.keys() & self._fleet.nodes.keys():
            self._roster.forget_node(name, self._released[name])
            self._regroup.forget_node(name)
        self._released.clear()

    # ------------------------------------------------------------------------------------------------------ ending

    def save_newest(self, timeout_s: float) -> bool:
        """Make the newest state in memory durable, whatever the workers do; whether storage has it now.

        Nothing of the old generation counts any more after this. Without the cluster's head there is little time.
        """
        deadline = time.monotonic() + (timeout_s if head_answers() else min(timeout_s, HEADLESS_S))
        best = self._regroup.last_state(v.Fence(self._state.generation + 1, (), self._state.trusted), deadline)
        return best is not None and self._saving.newest(best, deadline - time.monotonic())

    def evaluate(self, step: int) -> Evaluation:
        """Judge the durable checkpoint of this step on one of the workers; raises RayError when that fails."""
        ready = next(w for w in self._fleet.workers.values() if w.info is not None)
        micro_batch = self._state.choice(len(self._state.members)).layout.micro_batch
        evaluation: Evaluation = ray.get(ready.actor.evaluate.remote(step, micro_batch))
        return evaluation

    def show(self, status: RunState) -> None:
        """Publish the live state now, under this name."""
        self._live.status = status
        self._live.publish(self._fleet, self._state, self._roster.progress, force=True)
