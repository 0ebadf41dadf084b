"""The supervisor: hears what happens, asks the state machine what to do, and does it. One thread, one loop.

It holds no policy: `control.machine` decides. It owns the truth of the run's story: every event goes through `emit`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from elastictrain.checkpoint.store import CheckpointStore
from elastictrain.config import TrainConfig
from elastictrain.control import vocabulary as v
from elastictrain.control.machine import advance, begin
from elastictrain.control.state import Policy, State
from elastictrain.data.order import cursor
from elastictrain.events import (
    Cause,
    CheckpointRejected,
    Continuation,
    Event,
    FailureDetected,
    FaultInjected,
    GenerationStarted,
    Member,
    Recovered,
    StepCommitted,
    Warned,
    WorkerStarted,
)
from elastictrain.plan.layout import legal_world_sizes
from elastictrain.runtime.board import Progress
from elastictrain.runtime.causes import explain
from elastictrain.runtime.commits import CommitCollector
from elastictrain.runtime.durable import Due, DurableWriter
from elastictrain.runtime.fencing import Fencing
from elastictrain.runtime.fleet import Fleet, Node
from elastictrain.runtime.forming import Forming
from elastictrain.runtime.live import Live
from elastictrain.runtime.protocol import (
    Evaluation,
    FaultAnnounced,
    FenceReply,
    KeeperEvent,
    KeeperInfo,
    KeeperTrouble,
    Outcome,
    RestoreFrom,
    SnapshotHeld,
    WorkerExited,
    WorkerInfo,
)
from elastictrain.runtime.replies import Replies
from elastictrain.status import RunState

POLL_S = 2.0
"""A keeper answers at once when it has something to say, and after this time when it has not."""
TICK_S = 0.1
LOOK_EVERY_S = 1.0
"""How often Ray is asked for its nodes."""
SUSPICION_S = 0.5
"""How long a dead worker's keeper has to tell of what, before the death is reported without a cause."""
PROBE_S = 1.0
"""How long after a broken collective its cause may take to show."""
QUIET_TIMEOUT_S = 10.0
START_TIMEOUT_S = 300.0


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
        self._start, self._live = start, live
        self._record = emit
        self._replies = Replies()
        self._collector = CommitCollector(start.restore.step, start.sample_chain)
        self._durable: DurableWriter | None = None
        self._state: State = begin(
            self._policy(), start.restore, start.generation, "resume" if start.restore.step else "start", time.time()
        )
        self._restore = RestoreFrom(start.restore.source, start.restore.step)
        self._restored_layout = start.layout
        self._fired = set(start.fired)
        self._fencing: Fencing | None = None
        self._forming: Forming | None = None
        self._unrecovered = False
        self._updated_step = 0
        self._lost_steps = 0
        self._fence_s = 0.0
        self._suspects: dict[str, tuple[float, Cause]] = {}
        self._broken: tuple[float, Cause] | None = None
        self._starting: dict[str, float] = {}
        self._progress: dict[str, Progress] = {}
        self._looked = 0.0
        self._first_step_pending = False
        self._stop: str | None = None
        self._end: v.End | None = None

    def _policy(self) -> Policy:
        elastic, train = self._config.elastic, self._config.train
        sizes = legal_world_sizes(train.global_batch, train.micro_batch, elastic.min_workers, elastic.max_workers)
        return Policy(
            steps=train.steps,
            world_sizes=sizes,
            standby=elastic.standby,
            max_failures=elastic.max_failures,
            replace_timeout_s=elastic.replace_timeout_s,
            wait_timeout_s=elastic.wait_timeout_s,
            unreserved_standby=not self._fleet.on_gpus,
        )

    # -------------------------------------------------------------------------------------------------------- loop

    def run(self) -> v.End:
        """Train until the end, whatever happens; returns how it ended."""
        while self._end is None:
            self._look()
            self._replies.wait(TICK_S)
            self._check_deadlines()
            if self._durable is not None:
                self._durable.poll()
            if self._stop is not None:
                self._tell(v.StopAsked(self._stop))
            self._tell(v.Tick())
            self._live.publish(self._fleet, self._state, self._progress, force=False)
        return self._end

    def stop(self, reason: str) -> None:
        """Ask for a clean stop; callable from a signal handler."""
        self._stop = reason

    def _emit(self, event: Event) -> None:
        self._live.fold(event)
        self._record(event)

    def _tell(self, seen: v.Observation) -> None:
        self._state, actions = advance(self._state, seen, time.time())
        for action in actions:
            self._perform(action)

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        for name, (deadline, cause) in list(self._suspects.items()):
            if now > deadline:
                del self._suspects[name]
                self._lose_worker(name, cause)
        if self._broken is not None and now > self._broken[0]:
            _, cause = self._broken
            self._broken = None
            self._fail("engine_error", None, cause, time.time(), 0)
            self._tell(v.PeersBroken(self._state.generation, cause))
        for name, begun in list(self._starting.items()):
            if now > begun + START_TIMEOUT_S:
                late = f"not ready {START_TIMEOUT_S:.0f} s after its start: no room for it, or a node too slow"
                self._lose_worker(name, Cause("resources", late))
        if self._fencing is not None:
            self._fencing.check()
        if self._forming is not None:
            self._forming.check()

    # ------------------------------------------------------------------------------------------------------- nodes

    def _look(self) -> None:
        if time.monotonic() < self._looked + LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        new, lost = self._fleet.look()
        for name in lost:
            self._lose_node(name, Cause("node_lost", f"Ray has declared node {name} dead"))
        for node in new:
            self._replies.expect(
                self._fleet.start_keeper(node),
                lambda info, node=node: self._keeper_up(node, info),  # type: ignore[misc]
                lambda error, node=node: self._keeper_failed(node.name, error),  # type: ignore[misc]
            )
        for node in self._fleet.nodes.values():
            if node.info is not None:
                self._replies.expect(node.keeper.progress.remote(), self._progress.update, lambda _: None)

    def _keeper_up(self, node: Node, info: KeeperInfo) -> None:
        node.info = info
        self._poll(node)
        self._welcome()

    def _welcome(self) -> None:
        """Tell control of new nodes once all that were found together are ready, so that it can spread over them."""
        if all(node.info is not None for node in self._fleet.nodes.values()):
            new = {n.name: n.slots for n in self._fleet.nodes.values() if n.name not in self._state.nodes}
            if new:
                self._tell(v.NodesJoined(new))

    def _poll(self, node: Node) -> None:
        self._replies.expect(
            node.keeper.poll.remote(node.read, POLL_S),
            lambda events: self._polled(node, events),
            lambda error: self._keeper_failed(node.name, error),
        )

    def _polled(self, node: Node, events: list[tuple[int, KeeperEvent]]) -> None:
        if self._fleet.nodes.get(node.name) is node:
            self._hear(node, events)
            self._poll(node)

    def _keeper_failed(self, name: str, error: RayError) -> None:
        """A node without its keeper is as good as lost: its ranks' state is gone, and nobody watches them."""
        self._lose_node(name, Cause("node_lost", f"node {name} or its keeper is gone: {explain(error).message}"))

    def _lose_node(self, name: str, cause: Cause) -> None:
        if name not in self._fleet.nodes:
            return
        gone = {w.name for w in self._fleet.workers.values() if w.node == name}
        ranks = tuple(self._state.members.index(w) for w in gone if w in self._state.members)
        if ranks and self._state.phase in ("forming", "running"):
            self._detected("node_lost", ranks, name, 0, cause, time.time(), self._collector.step + 1)
        else:
            self._emit(Warned(time.time(), "node", cause.message))
        self._fleet.drop_node(name)
        for worker in gone:
            self._forget(worker)
        if self._fencing is not None:
            self._fencing.forget_node(name)
        self._tell(v.NodeLost(name, cause))
        self._welcome()

    # --------------------------------------------------------------------------------------------- keepers' events

    def _hear(self, node: Node, events: list[tuple[int, KeeperEvent]] | tuple[tuple[int, KeeperEvent], ...]) -> None:
        for number, event in events:
            if number <= node.read:
                continue
            node.read = number
            match event:
                case SnapshotHeld(header):
                    self._commit(self._collector.add(header, time.time()))
                case WorkerExited(worker, at, cause, _, step, phase):
                    if phase in ("snapshot", "idle"):
                        self._updated_step = max(self._updated_step, step)
                    self._lose_worker(worker, cause, at, step)
                case FaultAnnounced(at, index, step, rank):
                    self._fired.add(index)
                    self._emit(FaultInjected(at, index, step, rank, self._config.faults[index].kind))
                case KeeperTrouble(topic, message):
                    self._emit(Warned(time.time(), topic, message))

    def _commit(self, steps: list[StepCommitted]) -> None:
        for event in steps:
            self._emit(event)
            if self._first_step_pending:
                self._first_step_pending = False
                self._recovered(event)
            if event.step % self._config.checkpoint.every == 0:
                self._make_durable(event.step)
            self._tell(v.StepDone(event.generation, event.step))

    def _recovered(self, first: StepCommitted) -> None:
        if self._unrecovered:
            self._emit(
                Recovered(
                    at=first.finished_at,
                    generation=first.generation,
                    first_step=first.step,
                    lost_steps=self._lost_steps,
                    source=self._restore.source,
                    continuation=self._continuation,
                )
            )
        self._unrecovered = False
        self._lost_steps = 0
        for node in self._fleet.nodes.values():
            node.keeper.release.remote(first.generation)

    def _make_durable(self, step: int) -> None:
        members = self._state.members
        keepers = {rank: self._fleet.nodes[self._fleet.workers[w].node].keeper for rank, w in enumerate(members)}
        self._request_durable(step, self._state.generation, keepers, self._layout_of(len(members)))

    def _request_durable(self, step: int, generation: int, keepers: dict[int, Any], layout: dict[str, Any]) -> None:
        if self._durable is None:
            return
        self._durable.request(
            Due(
                generation=generation,
                step=step,
                world_size=len(keepers),
                keepers=keepers,
                layout=layout,
                scalars={"optimizer_step": step},
                samples=cursor(step, self._config.train.global_batch),
                sample_chain=self._collector.chains[step],
                loss=self._collector.losses[step],
            )
        )

    def _layout_of(self, world_size: int) -> dict[str, Any]:
        return self._config.layout(world_size).to_json()

    # ----------------------------------------------------------------------------------------------------- workers

    def _worker_up(self, name: str, info: WorkerInfo) -> None:
        begun = self._starting.pop(name, None)
        handle = self._fleet.workers.get(name)
        if handle is None or begun is None:
            return
        handle.info = info
        self._emit(WorkerStarted(time.time(), name, info.node, info.pid, time.monotonic() - begun))
        self._tell(v.WorkerUp(name))

    def _start_failed(self, name: str, error: RayError) -> None:
        cause = explain(error)
        if cause.kind == "unknown":
            self._suspect(name, cause)
        else:
            self._lose_worker(name, cause)

    def _suspect(self, name: str, cause: Cause) -> None:
        if name in self._fleet.workers:
            self._suspects.setdefault(name, (time.monotonic() + SUSPICION_S, cause))

    def _lose_worker(self, name: str, cause: Cause, at: float | None = None, step: int = 0) -> None:
        handle = self._fleet.workers.get(name)
        if handle is None:
            return
        member = name in self._state.members and self._state.phase in ("forming", "running", "fencing")
        step = step or self._collector.step + 1
        pid = handle.info.pid if handle.info else 0
        if member:
            rank = self._state.members.index(name)
            self._detected("worker_lost", (rank,), handle.node, pid, cause, at or time.time(), step)
        elif self._end is None:
            self._emit(Warned(time.time(), "worker", f"{name} (pid {pid}, node {handle.node}): {cause.message}"))
        self._fleet.drop_worker(name)
        self._forget(name)
        self._tell(v.WorkerDied(name, cause, step))
        if self._fencing is not None:
            self._fencing.forget_worker(name)

    def _forget(self, name: str) -> None:
        for known in (self._suspects, self._starting, self._progress):
            known.pop(name, None)

    def _training_ended(self, worker: str, generation: int, outcome: Outcome) -> None:
        if generation != self._state.generation or self._state.phase not in ("forming", "running"):
            return
        cause = outcome.cause or Cause("unknown", outcome.kind)
        if outcome.kind == "raised":
            self._fail("user_error", worker, cause, outcome.at, outcome.step)
            self._tell(v.RankRaised(generation, worker, outcome.step, cause))
        elif outcome.kind == "peers_broken":
            self._note_broken(cause)

    def _note_broken(self, cause: Cause) -> None:
        if self._broken is None:
            self._broken = time.monotonic() + PROBE_S, cause

    def _fail(self, kind: str, worker: str | None, cause: Cause, at: float, step: int) -> None:
        handle = self._fleet.workers.get(worker or "")
        ranks = (self._state.members.index(worker),) if worker in self._state.members else ()
        node, pid = (handle.node, handle.info.pid if handle.info else 0) if handle else ("", 0)
        self._detected(kind, ranks, node, pid, cause, at, step or self._collector.step + 1)

    def _detected(
        self, kind: str, ranks: tuple[int, ...], node: str, pid: int, cause: Cause, at: float, step: int
    ) -> None:
        failed = self._state.generation - (self._state.phase == "fencing")  # while fencing, it is the next one's number
        self._unrecovered = True
        self._emit(FailureDetected(at, time.time(), failed, kind, ranks, node, pid, cause, step))

    # ----------------------------------------------------------------------------------------------------- actions

    def _perform(self, action: v.Action) -> None:
        match action:
            case v.StartWorker(name, node, reserved):
                self._starting[name] = time.monotonic()
                self._replies.expect(
                    self._fleet.start_worker(name, node, reserved, self._data_folder),
                    lambda info: self._worker_up(name, info),
                    lambda error: self._start_failed(name, error),
                )
            case v.StopWorker(name):
                self._fleet.drop_worker(name)
                self._forget(name)
            case v.Fence():
                self._fence(action)
            case v.Form():
                self._form(action)
            case v.Pause(generation, step):
                for name in self._state.members:
                    self._fleet.workers[name].actor.pause.remote(generation, step)
            case v.Warn(topic, message):
                self._live.message = message
                self._emit(Warned(time.time(), topic, message))
            case v.End():
                self._end = action

    def _fence(self, order: v.Fence) -> None:
        self._broken = None
        if self._forming is not None:
            self._forming.over = True
            self._forming = None
        self._fence_began = time.monotonic()
        self._fencing = self._new_fencing(order, self._fenced)
        self._fencing.start()

    def _new_fencing(self, order: v.Fence, done: Callable[[Fencing], None]) -> Fencing:
        return Fencing(
            order=order,
            fleet=self._fleet,
            replies=self._replies,
            quiet_timeout_s=QUIET_TIMEOUT_S,
            lose_worker=self._lose_worker,
            suspect=self._suspect,
            lose_node=self._keeper_failed,
            hear=self._hear_fenced,
            done=done,
        )

    def _hear_fenced(self, name: str, reply: FenceReply) -> None:
        self._hear(self._fleet.nodes[name], reply.events)
        for stored in reply.held:
            self._commit(self._collector.add(stored.header, time.time()))

    def _fenced(self, fencing: Fencing) -> None:
        self._fencing = None
        best = fencing.best()
        durable = self._durable.written_step if self._durable else -1
        updated = max(self._updated_step, fencing.updated_step)
        self._updated_step = 0
        if best is not None and best[0].step >= durable:
            state, shards = best
            self._restore = RestoreFrom("memory", state.step, shards)
            self._restored_layout = self._layout_of(len(shards))
        else:
            self._restore, self._restored_layout = self._from_storage()
        lost_steps = max(updated, self._collector.step) - self._restore.step
        self._lost_steps = max(self._lost_steps, lost_steps)  # a failure before the first step adds to the one before
        self._fence_s = time.monotonic() - self._fence_began
        self._fence_began = time.monotonic()
        point = v.RestorePoint(self._restore.source, self._restore.step)
        self._tell(v.Fenced(fencing.order.generation, point))

    def _from_storage(self) -> tuple[RestoreFrom, dict[str, Any] | None]:
        stored = self._store.newest_verified(
            None, lambda step, uri, problem: self._emit(CheckpointRejected(time.time(), step, uri, problem))
        )
        if stored is None:
            return RestoreFrom("fresh", 0), None
        self._collector.chains[stored.step] = stored.manifest.sample_chain
        return RestoreFrom("durable", stored.step), dict(stored.manifest.layout)

    def _form(self, order: v.Form) -> None:
        self._place_s = time.monotonic() - getattr(self, "_fence_began", time.monotonic())
        self._forming = Forming(
            order=order,
            config=self._config,
            fleet=self._fleet,
            replies=self._replies,
            restore=self._restore,
            fired=frozenset(self._fired),
            formed=self._formed,
            failed=self._form_failed,
            suspect=self._suspect,
            broken=self._note_broken,
            ended=self._training_ended,
        )
        self._forming.start()

    def _formed(self, forming: Forming) -> None:
        self._forming = None
        order, layout = forming.order, forming.layout.to_json()
        self._continuation: Continuation = "bit_exact" if self._restored_layout in (None, layout) else "order_exact"
        self._collector.begin(order.generation, len(order.workers), order.restore.step)
        self._first_step_pending = True
        if self._durable is None:
            self._durable = DurableWriter(
                self._config.run.name, self._store, forming.tensors, self._config.checkpoint.keep_last, self._emit
            )
        members = []
        for rank, name in enumerate(order.workers):
            handle = self._fleet.workers[name]
            members.append(Member(rank, name, handle.info.pid if handle.info else 0, handle.node))
        self._emit(
            GenerationStarted(
                at=time.time(),
                index=order.generation,
                layout=layout,
                world_size=len(members),
                first_step=order.restore.step + 1,
                cause=order.cause,
                source=order.restore.source,
                continuation=self._continuation,
                members=tuple(members),
                phases_s={"fence": self._fence_s, "place": self._place_s, **forming.seconds},
            )
        )
        self._tell(v.Formed(order.generation))

    def _form_failed(self, worker: str | None, cause: Cause) -> None:
        self._forming = None
        self._fail("engine_error", worker, cause, time.time(), 0)
        self._tell(v.FormFailed(self._state.generation, worker, cause))

    # ------------------------------------------------------------------------------------------------------ ending

    def save_newest(self, timeout_s: float) -> bool:
        """Make the newest state in memory durable, whatever the workers do; whether storage has it now.

        Nothing of the old generation counts any more after this.
        """
        found: list[Fencing] = []
        order = v.Fence(self._state.generation + 1, ())
        fencing = self._new_fencing(order, found.append)
        fencing.start()
        deadline = time.monotonic() + timeout_s
        while not found and time.monotonic() < deadline:
            self._replies.wait(TICK_S)
        best = found[0].best() if found else None
        if best is None or self._durable is None:
            return False
        state, shards = best
        if state.step not in self._collector.losses:
            return self._durable.written_step >= state.step
        self._durable.finish(max(0.0, deadline - time.monotonic()))
        if self._durable.written_step < state.step:
            keepers = {rank: self._fleet.nodes[s.stored.where].keeper for rank, s in enumerate(shards)}
            self._request_durable(state.step, state.generation, keepers, self._layout_of(len(shards)))
        self._durable.finish(max(0.0, deadline - time.monotonic()))
        return self._durable.written_step >= state.step

    def evaluate(self, step: int) -> Evaluation:
        """Judge the durable checkpoint of this step on one of the workers; raises RayError when that fails."""
        ready = [w for w in self._fleet.workers.values() if w.info is not None]
        reply = ready[0].actor.evaluate.remote(self._config.run.storage, step)
        evaluation: Evaluation = ray.get(reply)
        return evaluation

    def show(self, status: RunState) -> None:
        """Publish the live state now, under this name."""
        self._live.status = status
        self._live.publish(self._fleet, self._state, self._progress, force=True)
