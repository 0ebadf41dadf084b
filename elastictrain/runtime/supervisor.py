"""The supervisor: hears what happens, asks the state machine what to do, and does it. One thread, one loop.

It holds no policy: `control.machine` decides. `roster` knows who is there, `story` tells what happened, `fencing` and
`forming` perform the two actions that take several messages.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from elastictrain.checkpoint.store import CheckpointStore
from elastictrain.config import TrainConfig
from elastictrain.control import vocabulary as v
from elastictrain.control.budget import Budgets
from elastictrain.control.interval import SnapshotInterval
from elastictrain.control.loss_guard import Seen
from elastictrain.control.machine import advance, begin
from elastictrain.control.restore import is_trusted
from elastictrain.control.state import Policy, State
from elastictrain.data.order import cursor
from elastictrain.events import (
    Cause,
    CheckpointRejected,
    Event,
    FaultInjected,
    Member,
    WorkerStarted,
)
from elastictrain.plan.layout import legal_world_sizes, micro_batch_ladder
from elastictrain.runtime.commits import CommitCollector
from elastictrain.runtime.durable import Due, DurableWriter
from elastictrain.runtime.fencing import Fencing
from elastictrain.runtime.fleet import Fleet
from elastictrain.runtime.forming import Forming, pair_keepers
from elastictrain.runtime.live import Live
from elastictrain.runtime.probe import Probe
from elastictrain.runtime.protocol import (
    Evaluation,
    FaultAnnounced,
    KeeperEvent,
    KeeperTrouble,
    LeaveAsked,
    Outcome,
    RestoreFrom,
    SnapshotHeld,
    WorkerExited,
    WorkerInfo,
)
from elastictrain.runtime.replies import Replies
from elastictrain.runtime.roster import Roster
from elastictrain.runtime.story import Story
from elastictrain.runtime.vigil import Vigil
from elastictrain.state.tensors import ShardHeader
from elastictrain.status import RunState

TICK_S = 0.2
PROBE_S = 3.0
"""How long after a broken collective its cause may take to show; Ray needs 1 to 2 s to tell of a node's end."""
QUIET_TIMEOUT_S = 10.0
"""How long a survivor may take to leave its generation before it is ended."""


@dataclass(frozen=True, slots=True)
class StartPoint:
    """Where an attempt begins."""

    restore: v.RestorePoint
    sample_chain: str
    layout: dict[str, Any] | None
    """That the state was made under; None for a fresh start."""
    generation: int
    fired: frozenset[int]
    """Planned faults that struck in earlier attempts."""
    micro_batch: int
    """The one in force: smaller than train.micro_batch when memory ran out in earlier attempts."""
    seen: tuple[Seen, ...] = ()
    """What is recorded of the last steps, up to the restored state's."""


class Supervisor:
    """Runs one attempt: `run` returns how it ended; then `save_newest` makes the last state durable."""

    def __init__(
        self,
        config: TrainConfig,
        fleet: Fleet,
        data_folder: str,
        store: CheckpointStore,
        start: StartPoint,
        live: Live,
        emit: Callable[[Event], None],
    ) -> None:
        self._config, self._fleet, self._data_folder, self._store = config, fleet, data_folder, store
        self._live, self._record = live, emit
        self._replies = Replies()
        self._roster = Roster(fleet, self._replies, self)
        restore = RestoreFrom(start.restore.source, start.restore.step)
        commits = CommitCollector(start.restore.step, start.sample_chain, start.seen)
        self._story = Story(self._emit, commits, restore, start.layout)
        cause = "resume" if start.restore.step else "start"
        policy = self._policy(start.micro_batch)
        self._state: State = begin(policy, start.restore, start.generation, cause, time.time())
        self._layouts: dict[int, dict[str, Any]] = {}
        """Of each generation that was ever formed, and so of every snapshot."""
        self._durable: DurableWriter | None = None
        self._fencing: Fencing | None = None
        self._forming: Forming | None = None
        self._fired = set(start.fired)
        self._broken: tuple[float, Cause] | None = None
        """When a collective broke (unix time) for a reason that has not shown yet, and what it said."""
        self._probe: Probe | None = None
        """Asks the nodes of a group whose collective broke whether they are there."""
        self._places: list[str] = []
        """The node of each rank of the newest generation: its keeper has the rank's state, whether the rank lives."""
        self._paused: set[str] = set()
        """Members that have stopped for a pause."""
        self._released: dict[str, float] = {}
        """Nodes that may go once no checkpoint is being written from there, and how long to leave them alone."""
        self._fence_s = 0.0
        self._phase_began = time.monotonic()
        self._interval = SnapshotInterval(config.snapshot.every)
        self._vigil = Vigil(config.elastic, self._roster, self._replies, self._story, self.worker_lost, self._tell)
        self._stop: str | None = None
        self._ticked = 0.0
        self._end: v.End | None = None

    def _policy(self, micro_batch: int) -> Policy:
        elastic, train = self._config.elastic, self._config.train
        sizes = legal_world_sizes(train.global_batch, train.micro_batch, elastic.min_workers, elastic.max_workers)
        ladder = micro_batch_ladder(train.global_batch, train.micro_batch, sizes)
        return Policy(
            steps=train.steps,
            world_sizes=sizes,
            standby=elastic.standby,
            budgets=Budgets.of(elastic),
            replace_timeout_s=elastic.replace_timeout_s,
            wait_timeout_s=elastic.wait_timeout_s,
            unreserved_standby=not self._fleet.on_gpus,
            micro_batches=tuple(m for m in ladder if m <= micro_batch),
        )

    # -------------------------------------------------------------------------------------------------------- loop

    def run(self) -> v.End:
        """Train until the end, whatever happens; returns how it ended."""
        while self._end is None:
            self._roster.check()
            self._replies.wait(TICK_S)
            self._check()
            self._tick()
            self._live.publish(self._fleet, self._state, self._roster.progress, force=False)
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
        if self._broken is not None and time.time() > self._broken[0] + PROBE_S:
            at, cause = self._broken
            self._broken = None
            if self._grouped:
                self._story.fail("engine_error", cause, generation=self._state.generation, at=at)
                self._tell(v.PeersBroken(self._state.generation, cause))
        if self._probe is not None:
            for name in self._probe.silent():
                self._roster.node_failed(name, "nobody answers at its raylet's port")
        for part in (self._fencing, self._forming):
            if part is not None:
                part.check()
        if self._durable is not None:
            self._durable.poll()
        if self._released and not (self._durable and self._durable.busy):
            self._release()

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

    @property
    def _failed(self) -> int:
        """The generation that a failure belongs to: while one is fenced, the state has the next one's number."""
        return self._state.generation - (self._state.phase == "fencing")

    def _ranks(self, workers: set[str]) -> tuple[int, ...]:
        """The ranks that these hold, or held until the fence that is under way."""
        state = self._state
        if state.phase not in ("forming", "running", "fencing"):
            return ()
        if state.phase == "fencing":  # who has notice may go then, and nothing fails
            workers = workers - {name for name, worker in state.workers.items() if worker.notice is not None}
        return tuple(rank for rank, name in enumerate(state.members) if name in workers)

    # ------------------------------------------------------------------------------------------ facts, from the roster

    def nodes_ready(self, slots: dict[str, int]) -> None:
        """See `roster.Listener`."""
        self._tell(v.NodesJoined(slots))

    def node_lost(self, name: str, cause: Cause) -> None:
        """See `roster.Listener`."""
        if name not in self._fleet.nodes:
            return
        ranks = self._ranks(self._roster.forget_node(name))
        if ranks:
            self._story.fail("node_lost", cause, generation=self._failed, ranks=ranks, node=name, at=self._first_sign)
        else:
            self._story.warn("node", cause.message)
        self._tell(v.NodeLost(name, cause))
        if self._fencing is not None:
            self._fencing.forget_node(name)

    def keeper_lost(self, name: str, cause: Cause) -> None:
        """See `roster.Listener`."""
        ranks = self._ranks({w.name for w in self._fleet.workers.values() if w.node == name})
        if ranks:
            self._story.fail("keeper_lost", cause, generation=self._failed, ranks=ranks, node=name)
        else:
            self._story.warn("node", cause.message)
        self._tell(v.KeeperLost(name, cause))
        if self._fencing is not None:
            self._fencing.forget_node(name)

    def worker_adopted(self, name: str) -> None:
        """See `roster.Listener`."""
        self._tell(v.WorkerUp(name))

    def node_leaves(self, name: str, deadline: float) -> None:
        """See `roster.Listener`."""
        if name not in self._places and len(set(self._places)) == 1:  # it may be the only buddy
            pair_keepers(self._fleet, self._places)
        deadline = deadline or time.time() + self._config.elastic.preempt_grace_s
        self._tell(v.Leaving(f"node {name} is drained", deadline, node=name))

    def worker_ready(self, name: str, info: WorkerInfo, seconds: float) -> None:
        """See `roster.Listener`."""
        self._emit(WorkerStarted(time.time(), name, info.node, info.pid, seconds))
        self._tell(v.WorkerUp(name))

    def worker_lost(
        self, name: str, cause: Cause, at: float | None = None, step: int = 0, kind: str = "worker_lost"
    ) -> None:
        """See `roster.Listener`."""
        handle = self._fleet.workers.get(name)
        if handle is None:
            return
        pid = handle.info.pid if handle.info else 0
        ranks = self._ranks({name})
        if ranks:
            self._story.fail(
                kind,
                cause,
                generation=self._failed,
                ranks=ranks,
                node=handle.node,
                pid=pid,
                at=at or self._first_sign,
                step=step,
            )
        elif self._end is None:
            self._story.warn("worker", f"{name} (pid {pid}, node {handle.node}): {cause.message}")
        self._roster.forget_worker(name)
        self._tell(v.WorkerDied(name, cause, step or self._story.step + 1))
        if self._fencing is not None:
            self._fencing.forget_worker(name)

    def keeper_event(self, event: KeeperEvent) -> None:
        """See `roster.Listener`."""
        match event:
            case SnapshotHeld(header):
                self._commit(header)
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

    def _commit(self, header: ShardHeader) -> None:
        if not is_trusted(self._state.trusted, header.generation, header.step):
            return
        steps, first = self._story.commit(header)
        if first:
            for node in self._fleet.nodes.values():
                node.keeper.release.remote(header.generation)
        for event in steps:
            if event.step % self._config.checkpoint.every == 0 and self._fleet.nodes.keys() >= set(self._places):
                self._make_durable(event.step, event.generation, self._places)
            self._vigil.step(event.finished_at - event.begun_at)
            if self._interval.step(event.finished_at - event.begun_at, event.snapshot_stall_s):
                self._order(event.generation, str(self._interval.every))
                if self._interval.every > self._interval.told:
                    self._interval.told = self._interval.every
                    self._story.warn("snapshot", self._interval.words)
            self._tell(v.StepDone(event.generation, event.step))
        if steps:
            self._vigil.name_straggler(self._state)

    def _training_ended(self, worker: str, generation: int, outcome: Outcome) -> None:
        if generation != self._state.generation or not self._grouped:
            return
        cause = outcome.cause or Cause("unknown", outcome.kind)
        if outcome.kind == "raised":
            self._blame("oom" if cause.kind == "oom" else "user_error", worker, cause, outcome.at, outcome.step)
            self._tell(v.RankRaised(generation, worker, outcome.step, cause))
        elif outcome.kind == "peers_broken":
            self._note_broken(cause, outcome.at)
        elif outcome.kind == "paused":
            self._paused.add(worker)
            if self._paused >= set(self._state.members):  # a fence would cut off who is not there yet, and its step
                self._tell(v.Paused(generation))
        elif outcome.kind == "corrupted":
            guilty = tuple(self._state.members[rank] for rank in outcome.guilty)
            for name in guilty or (None,):
                self._blame("corrupted", name, cause, outcome.at, outcome.step)
            if self._durable is not None:
                self._durable.distrust(outcome.trusted_step)
            self._tell(v.StateCorrupted(generation, guilty, outcome.trusted_step, cause))

    def _note_broken(self, cause: Cause, at: float | None = None) -> None:
        if self._broken is None:
            self._broken = at or time.time(), cause
            used = {self._fleet.workers[name].node for name in self._state.members if name in self._fleet.workers}
            self._probe = Probe({name: self._fleet.nodes[name].raylet for name in used if name in self._fleet.nodes})

    @property
    def _first_sign(self) -> float | None:
        """When the loss that is told now began to show, where something showed before."""
        return self._broken[0] if self._broken is not None else None

    def _blame(self, kind: str, worker: str | None, cause: Cause, at: float | None = None, step: int = 0) -> None:
        handle = self._fleet.workers.get(worker or "")
        self._story.fail(
            kind,
            cause,
            generation=self._state.generation,
            ranks=self._ranks({worker}) if worker else (),
            node=handle.node if handle else "",
            pid=handle.info.pid if handle and handle.info else 0,
            at=at,
            step=step,
        )

    # ----------------------------------------------------------------------------------------------------- actions

    def _perform(self, action: v.Action) -> None:
        match action:
            case v.StartWorker(name, node, reserved):
                self._roster.start(name, node, reserved, self._data_folder)
            case v.StopWorker(name):
                self._roster.forget_worker(name)
            case v.Fence():
                self._fence(action)
            case v.Form():
                self._form(action)
            case v.Pause(generation):
                self._order(generation, "pause")
            case v.Save():
                self._save_restored()
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

    def _fence(self, order: v.Fence) -> None:
        self._broken = None
        if self._probe is not None:
            self._probe.close()
            self._probe = None
        self._paused.clear()
        if self._forming is not None:
            self._forming.over = True
            self._forming = None
        self._phase_began = time.monotonic()
        self._fencing = self._new_fencing(order, self._fenced)
        self._fencing.start()

    def _new_fencing(self, order: v.Fence, done: Callable[[Fencing], None]) -> Fencing:
        return Fencing(
            order=order,
            fleet=self._fleet,
            replies=self._replies,
            quiet_timeout_s=QUIET_TIMEOUT_S,
            lose_worker=self.worker_lost,
            suspect=self._roster.suspect,
            lose_node=self._roster.keeper_failed,
            hear=lambda name, reply: self._roster.hear(self._fleet.nodes[name], reply.events),
            held=self._commit,
            done=done,
        )

    def _fenced(self, fencing: Fencing) -> None:
        self._fencing = None
        story = self._story
        story.updated_step = max(story.updated_step, fencing.updated_step)
        best = fencing.best()
        if best is not None and best[0].step >= (self._durable.written_step if self._durable else -1):
            state, shards = best
            story.restore(RestoreFrom("memory", state.step, shards), self._layouts[state.generation])
        else:
            story.restore(*self._from_storage())
        self._fence_s, self._phase_began = time.monotonic() - self._phase_began, time.monotonic()
        point = v.RestorePoint(story.restored.source, story.restored.step)
        self._tell(v.Fenced(fencing.order.generation, point))

    def _from_storage(self) -> tuple[RestoreFrom, dict[str, Any] | None]:
        def reject(step: int, uri: str, problem: str) -> None:
            self._emit(CheckpointRejected(time.time(), step, uri, problem))

        stored = self._store.take_newest({}, reject, lambda manifest: "")  # this attempt wrote or verified them
        if stored is None:
            return RestoreFrom("fresh", 0), None
        self._story.commits.chains[stored.step] = stored.manifest.sample_chain
        return RestoreFrom("durable", stored.step), dict(stored.manifest.layout)

    def _form(self, order: v.Form) -> None:
        self._place_s = time.monotonic() - self._phase_began
        self._forming = Forming(
            order=order,
            config=self._config,
            fleet=self._fleet,
            replies=self._replies,
            restore=self._story.restored,
            fired=frozenset(self._fired),
            snapshot_every=self._interval.every,
            seen=self._story.commits.seen_before(order.restore.step + 1),
            formed=self._formed,
            failed=self._form_failed,
            suspect=self._roster.suspect,
            broken=self._note_broken,
            ended=self._training_ended,
        )
        self._layouts[order.generation] = self._forming.layout.to_json()
        self._forming.start()

    def _formed(self, forming: Forming) -> None:
        self._forming = None
        if self._durable is None:
            self._durable = DurableWriter(
                self._config.run.name, self._store, forming.tensors, self._config.checkpoint.keep_last, self._emit
            )
        handles = [self._fleet.workers[name] for name in forming.order.workers]
        members = tuple(
            Member(rank, handle.name, handle.info.pid if handle.info else 0, handle.node)
            for rank, handle in enumerate(handles)
        )
        self._places = [handle.node for handle in handles]
        phases_s = {"fence": self._fence_s, "place": self._place_s, **forming.seconds}
        self._story.begin(forming.order, self._layouts[forming.order.generation], members, phases_s)
        self._vigil.begin(forming.order.generation)
        self._tell(v.Formed(forming.order.generation))

    def _form_failed(self, worker: str | None, cause: Cause) -> None:
        self._forming = None
        self._blame("engine_error", worker, cause)
        self._tell(v.FormFailed(self._state.generation, worker, cause))

    def _make_durable(self, step: int, generation: int, nodes: list[str]) -> None:
        """Write the snapshot of this step, rank i's shard being with the keeper of nodes[i]."""
        commits = self._story.commits
        if self._durable is not None:
            self._durable.request(
                Due(
                    generation=generation,
                    step=step,
                    world_size=len(nodes),
                    keepers={rank: self._fleet.nodes[node].keeper for rank, node in enumerate(nodes)},
                    layout=self._layouts[generation],
                    scalars=commits.scalars[step],
                    samples=cursor(step, self._config.train.global_batch),
                    sample_chain=commits.chains[step],
                    loss=commits.losses[step],
                )
            )

    def _release(self) -> None:
        for name in self._released.keys() & self._fleet.nodes.keys():
            self._roster.forget_node(name, self._released[name])
            if self._fencing is not None:
                self._fencing.forget_node(name)
        self._released.clear()

    def _save_restored(self) -> None:
        restored = self._story.restored
        if restored.source == "memory" and restored.step in self._story.commits.losses:
            generation = restored.shards[0].stored.header.generation
            self._make_durable(restored.step, generation, [shard.stored.where for shard in restored.shards])

    # ------------------------------------------------------------------------------------------------------ ending

    def save_newest(self, timeout_s: float) -> bool:
        """Make the newest state in memory durable, whatever the workers do; whether storage has it now.

        Nothing of the old generation counts any more after this.
        """
        found: list[Fencing] = []
        self._new_fencing(v.Fence(self._state.generation + 1, (), self._state.trusted), found.append).start()
        deadline = time.monotonic() + timeout_s
        while not found and time.monotonic() < deadline:
            self._replies.wait(TICK_S)
        best = found[0].best() if found else None
        if best is None or self._durable is None:
            return False
        state, shards = best
        self._durable.finish(deadline - time.monotonic())
        if self._durable.written_step < state.step and state.step in self._story.commits.losses:
            self._make_durable(state.step, state.generation, [shard.stored.where for shard in shards])
            self._durable.finish(deadline - time.monotonic())
        return self._durable.written_step >= state.step

    def evaluate(self, step: int) -> Evaluation:
        """Judge the durable checkpoint of this step on one of the workers; raises RayError when that fails."""
        ready = next(w for w in self._fleet.workers.values() if w.info is not None)
        judged = ready.actor.evaluate.remote(self._config.run.storage, step, self._state.micro_batch)
        evaluation: Evaluation = ray.get(judged)
        return evaluation

    def show(self, status: RunState) -> None:
        """Publish the live state now, under this name."""
        self._live.status = status
        self._live.publish(self._fleet, self._state, self._roster.progress, force=True)
