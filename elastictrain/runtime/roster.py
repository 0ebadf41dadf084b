"""Who is there: nodes with their keepers, workers coming up, and those that are suspected to be gone.

It finds nodes through Ray, keeps one long poll on each keeper, and turns silence into facts after a while. What those
facts mean is the supervisor's to say: every callback goes there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from ray.exceptions import RayError

from elastictrain.events import Cause
from elastictrain.runtime.board import Progress
from elastictrain.runtime.causes import Failure, explain
from elastictrain.runtime.cluster import head_address
from elastictrain.runtime.fleet import BAN_S, Fleet, Node, Survey, WorkerHandle
from elastictrain.runtime.probe import answers
from elastictrain.runtime.protocol import Answered, KeeperEvent, KeeperInfo, KeeperTrouble, Question, WorkerInfo
from elastictrain.runtime.questions import Questions
from elastictrain.runtime.replies import Replies
from elastictrain.runtime.silence import Silence

POLL_S = 2.0
"""A keeper answers at once when it has something to say, and after this time when it has not."""
LOOK_EVERY_S = 1.0
"""How often Ray is asked for its nodes."""
WATCH_EVERY_S = 0.5
"""How often keepers are asked where their ranks are."""
SUSPICION_S = 0.5
"""How long a dead worker's keeper has to tell of what, before the death is reported without a cause."""
START_TIMEOUT_S = 300.0
HEAD_PATIENCE_S = 10.0
"""A cluster whose head answers nothing for so long is gone. Ray ends this process for it after a minute."""
HEAD_TIMEOUT_S = 0.5
REFUSED_S = 600.0
"""A node that fails its preflight is looked at again after so long."""

NumberedEvents = Iterable[tuple[int, KeeperEvent]]


class Listener(Protocol):
    """Hears the facts."""

    @property
    def recorded_step(self) -> int:
        """All steps up to this one are on record."""
        ...

    def nodes_found(self, slots: dict[str, int]) -> None:
        """Nodes that are new, or whose room has changed, with room for so many workers."""
        ...

    def node_refused(self, name: str, problem: str) -> None:
        """A node that was found is not fit for use; nothing of it was used yet."""
        ...

    def node_lost(self, name: str, cause: Cause) -> None:
        """A node or its keeper is gone."""
        ...

    def keeper_lost(self, name: str, pid: int, cause: Cause, at: float | None = None) -> None:
        """A node's keeper is gone, since `at` if that is known; the node and its workers live, another keeper comes."""
        ...

    def head_lost(self, message: str) -> None:
        """The cluster is gone, as far as can be told: nothing of it can be asked or changed any more."""
        ...

    def node_leaves(self, name: str, deadline: float) -> None:
        """A node will be gone at this unix time, or soon where it is 0."""
        ...

    def worker_ready(self, name: str, info: WorkerInfo, seconds: float) -> None:
        """A worker is warm."""
        ...

    def worker_adopted(self, name: str) -> None:
        """A worker has its node's next keeper."""
        ...

    def worker_lost(self, name: str, cause: Cause) -> None:
        """A worker is gone, or never came up."""
        ...

    def keeper_event(self, event: KeeperEvent) -> None:
        """A keeper tells something."""
        ...

    def progress_told(self) -> None:
        """Keepers have told where their ranks are: see `Roster.progress`."""
        ...


@dataclass
class Roster:
    """Watches over the fleet; `check` is called often."""

    fleet: Fleet
    replies: Replies
    listener: Listener
    progress: dict[str, Progress] = field(default_factory=dict)
    """Where each worker was when last asked."""
    _suspects: dict[str, tuple[float, Cause]] = field(default_factory=dict)
    _starting: dict[str, float] = field(default_factory=dict)
    _looked: float = 0.0
    _survey: Future[Survey] | None = None
    _held: list[Callable[[], None]] = field(default_factory=list)
    """What waits for the head to answer."""
    _head: tuple[str, int] = field(default_factory=head_address)
    _head_heard: float = field(default_factory=time.monotonic)
    _watched: float = 0.0
    _asked: set[Any] = field(default_factory=set)
    """Keepers whose answer is awaited."""
    _progressed: bool = False
    """Since the listener was told: of many nodes' answers it is told once."""
    _cold: list[str] = field(default_factory=list)
    """Workers that have been started, and not asked yet to get ready."""

    def __post_init__(self) -> None:
        self.questions = Questions(self.fleet, self.replies, self.keeper_failed)
        self._silence = Silence(self.fleet, self.replies, self.node_failed, self.replace_keeper)

    def check(self) -> None:
        """Look for nodes when it is time, and give up on whoever was silent for too long."""
        now = time.monotonic()
        for name, (deadline, cause) in list(self._suspects.items()):
            if now > deadline:
                self.listener.worker_lost(name, cause)
        for name, begun in list(self._starting.items()):
            if now > begun + START_TIMEOUT_S:
                late = f"not ready {START_TIMEOUT_S:.0f} s after its start: no room for it, or a node too slow"
                self.listener.worker_lost(name, Cause("resources", late))
        if now > self._looked + LOOK_EVERY_S:
            self._looked = now
            if self._head_answers():
                self._survey = self._survey or self.fleet.survey()
                while self._held:
                    self._held.pop(0)()
        self._warm_up()
        if self._survey is not None and self._survey.done():
            survey, self._survey = self._survey.result(), None
            self._look(survey)
        if self._progressed:
            self._progressed = False
            self.listener.progress_told()
        if now > self._watched + WATCH_EVERY_S:
            self._watched = now
            self._ask_for_progress()
            self._silence.look(now)

    def start(self, name: str, node: str, reserved: bool, data_folder: str) -> None:
        """Start a worker; as soon as the head answers, if it does not."""

        def begin() -> None:
            if node not in self.fleet.nodes:
                self._starting.pop(name, None)
            elif name in self._starting:
                self.fleet.start_worker(name, node, reserved, data_folder)
                self._cold.append(name)

        self._starting[name] = time.monotonic()
        self._with_head(begin)

    def suspect(self, name: str, cause: Cause) -> None:
        """Ray can't reach this worker; its keeper may know more in a moment."""
        if name in self.fleet.workers:
            self._suspects.setdefault(name, (time.monotonic() + SUSPICION_S, cause))

    def memory_of(self, workers: Sequence[str]) -> tuple[int, ...]:
        """Bytes that each of them has in use; empty unless all have told."""
        told = [self.progress[name].memory_bytes for name in workers if name in self.progress]
        return tuple(told) if len(told) == len(workers) and all(told) else ()

    def forget_worker(self, name: str) -> None:
        """End a worker, if it still lives."""
        self.fleet.drop_worker(name)
        self._suspects.pop(name, None)
        self._starting.pop(name, None)
        self.progress.pop(name, None)

    def forget_node(self, name: str, alone_s: float = 0.0) -> set[str]:
        """Give up on a node, for so many seconds at least; returns its workers."""
        gone = {w.name for w in self.fleet.workers.values() if w.node == name}
        keeper = self.fleet.nodes[name].keeper
        self.fleet.drop_node(name, max(alone_s, BAN_S))
        for worker in gone:
            self.forget_worker(worker)
        self.questions.lost(keeper)
        return gone

    def hear(self, node: Node, events: NumberedEvents) -> None:
        """Pass on what has not been heard yet."""
        for number, event in events:
            if number > node.read:
                node.read = number
                if isinstance(event, Answered):
                    self.questions.answered(event)
                else:
                    self.listener.keeper_event(event)

    def keeper_failed(self, name: str, error: RayError) -> None:
        """A keeper can't be reached: it is gone, or its node is."""
        node = self.fleet.nodes.get(name)
        if node is None:
            return
        if not answers(node.raylet):
            self.node_failed(name, explain(error).message)
            return
        cause = explain(error)
        if node.info is None:
            self.node_failed(name, f"its keeper does not come up: {cause.message}")
            return
        self.replace_keeper(node, cause)

    def replace_keeper(self, node: Node, why: Cause, at: float | None = None) -> None:
        """Start another keeper on a node that lives; its workers stay. `at` is when the last one fell silent."""
        lost = node.keeper
        self.questions.lost(lost)

        def replace() -> None:
            if self.fleet.nodes.get(node.name) is not node or node.keeper is not lost:
                return
            pid = node.info.pid if node.info else 0
            self._start_keeper(node)
            message = f"the keeper of node {node.name} is lost, and another takes over: {why.message}"
            cause = Cause("keeper", message, why.traceback, why.error_type)
            self.listener.keeper_lost(node.name, pid, cause, at)
            self.fleet.end(lost)

        self._with_head(replace)

    def node_failed(self, name: str, message: str) -> None:
        """A node is gone, or as good as gone."""
        self.listener.node_lost(name, Cause("node_lost", f"node {name} is gone: {message}"))

    def _head_answers(self) -> bool:
        """Whether Ray can be asked: without its head it blocks. Training needs no head for a while."""
        if answers(self._head, HEAD_TIMEOUT_S):
            self._head_heard = time.monotonic()
            return True
        silent_s = time.monotonic() - self._head_heard
        if silent_s > HEAD_PATIENCE_S:
            host, port = self._head
            self.listener.head_lost(f"the head of the Ray cluster ({host}:{port}) answers nothing for {silent_s:.0f} s")
        return False

    def _with_head(self, call: Callable[[], None]) -> None:
        """Now if the head answers, else when it does again: what needs it would block until then."""
        if answers(self._head, HEAD_TIMEOUT_S):
            call()
        else:
            self._held.append(call)

    def _look(self, survey: Survey) -> None:
        new, lost = self.fleet.compare(survey)
        for name in lost:
            self.listener.node_lost(name, Cause("node_lost", f"Ray has declared node {name} dead"))
        for node in new:
            self._start_keeper(node)
        # Their workers' processes come up beside their keepers, and are met when those are there.
        if found := {node.name: node.slots for node in new} | self.fleet.resized(survey):
            self.listener.nodes_found(found)
        for node, deadline in self.fleet.drained():
            self.listener.node_leaves(node.name, deadline)

    def _ask_for_progress(self) -> None:
        for node in self.fleet.nodes.values():
            if node.info is not None and node.keeper not in self._asked:
                self._asked.add(node.keeper)
                self.replies.expect(
                    node.keeper.progress.remote(),
                    lambda found, node=node, keeper=node.keeper: self._hear_progress(node.name, keeper, found),  # type: ignore[misc]  # defaults bind
                    lambda _, keeper=node.keeper: self._asked.discard(keeper),  # type: ignore[misc]  # defaults bind
                )

    def _hear_progress(self, name: str, keeper: Any, found: dict[str, Progress]) -> None:
        self._asked.discard(keeper)
        self._silence.heard(name)
        self.progress.update(found)
        self._progressed = True

    def _start_keeper(self, node: Node) -> None:
        self.replies.expect(
            self.fleet.start_keeper(node),
            lambda info: self._keeper_up(node, info),
            lambda error: self.keeper_failed(node.name, error),
        )

    def _keeper_up(self, node: Node, info: KeeperInfo) -> None:
        for problem in info.preflight.warn:
            self.listener.keeper_event(KeeperTrouble("node", f"node {node.name}: {problem}"))
        if info.preflight.refuse:
            self._refuse(node, f"node {node.name} is not used: {info.preflight.refuse[0]}")
            return
        node.info = info
        self._silence.heard(node.name)
        self._poll(node)
        self._introduce(node, [w for w in self.fleet.workers.values() if w.node == node.name and w.info is not None])

    def _poll(self, node: Node) -> None:
        keeper = node.keeper
        self.replies.expect(
            keeper.poll.remote(node.read, POLL_S, self.listener.recorded_step),
            lambda events: self._polled(node, keeper, events),
            lambda error: self.keeper_failed(node.name, error) if node.keeper is keeper else None,
        )

    def _polled(self, node: Node, keeper: Any, events: Any) -> None:
        if self.fleet.nodes.get(node.name) is node and node.keeper is keeper:
            self.hear(node, events)
            self._poll(node)

    def _refuse(self, node: Node, problem: str) -> None:
        if any(worker.node == node.name and worker.info is not None for worker in self.fleet.workers.values()):
            self.listener.node_lost(node.name, Cause("node_lost", problem))  # with an earlier keeper it was used
        else:
            self.forget_node(node.name)
            self.listener.node_refused(node.name, problem)
        self.fleet.ban(node.ray_id, REFUSED_S)

    def _warm_up(self) -> None:
        cold = [self.fleet.workers[name] for name in self._cold if name in self.fleet.workers]
        # asked by way of their keepers
        begun = [worker.name for worker in cold if self.fleet.nodes[worker.node].info is not None]
        self._cold = [worker.name for worker in cold if worker.name not in begun]
        warm = Question("warm", (self.fleet.zero_stage,), again=True)
        self.questions.ask(warm, begun, self._worker_up, self._start_failed)

    def _worker_up(self, name: str, info: WorkerInfo) -> None:
        worker = self.fleet.workers.get(name)
        if worker is not None and name in self._starting:
            worker.info = info
            node = self.fleet.nodes[worker.node]
            if node.info is not None:  # else when its next keeper is up
                self._introduce(node, [worker])

    def _introduce(self, node: Node, workers: Sequence[WorkerHandle]) -> None:
        """Tell of warm workers, once they have their node's keeper: it may be another than when they were started."""
        known = [worker.name for worker in workers if worker.keeper is node.keeper]
        self.questions.ask(
            Question("adopt", (node.keeper,), together=True),
            [worker.name for worker in workers if worker.keeper is not node.keeper],
            partial(self._has_keeper, node, node.keeper),
            lambda name, failure: self.suspect(name, failure.cause),
        )
        for name in known:
            self._has_keeper(node, node.keeper, name, None)

    def _has_keeper(self, node: Node, keeper: Any, name: str, _: None) -> None:
        worker = self.fleet.workers.get(name)
        if worker is None or worker.info is None or node.keeper is not keeper:  # or there is yet another
            return
        worker.keeper = keeper
        begun = self._starting.pop(name, None)
        if begun is not None:
            self.listener.worker_ready(name, worker.info, time.monotonic() - begun)
        else:
            self.listener.worker_adopted(name)

    def _start_failed(self, name: str, failure: Failure) -> None:
        if failure.cause.kind == "unknown":
            self.suspect(name, failure.cause)
        else:
            self.listener.worker_lost(name, failure.cause)
