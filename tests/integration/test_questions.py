"""Two workers of a node asked with one message: real keepers and roster, and workers that only answer.

About 25 s on two cores, beside the shared cluster.
"""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray

from elastictrain.config import TrainConfig
from elastictrain.errors import PeerLostError
from elastictrain.events import Cause
from elastictrain.runtime.causes import Failure
from elastictrain.runtime.fleet import Fleet
from elastictrain.runtime.protocol import KeeperEvent, Question, WorkerExited, WorkerInfo
from elastictrain.runtime.replies import Replies
from elastictrain.runtime.roster import LOOK_EVERY_S, Roster
from elastictrain.runtime.silence import STUCK_S

PATIENCE_S = 60.0
SLOW, SLOW_S = "worker-2", 4.0
"""A worker that takes long to get warm."""


@dataclass
class Heard:
    """What the roster tells."""

    recorded_step: int = 0
    nodes: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)
    adopted: set[str] = field(default_factory=set)
    lost: list[tuple[str, Cause]] = field(default_factory=list)
    keepers: list[tuple[str, int, float | None]] = field(default_factory=list)
    exited: list[WorkerExited] = field(default_factory=list)

    def nodes_found(self, slots: dict[str, int]) -> None:
        self.nodes |= slots

    def node_refused(self, name: str, problem: str) -> None:
        self.refused[name] = problem

    def node_lost(self, name: str, cause: Cause) -> None:
        self.lost.append((name, cause))

    def keeper_lost(self, name: str, pid: int, cause: Cause, at: float | None = None) -> None:
        self.lost.append((name, cause))
        self.keepers.append((name, pid, at))

    def head_lost(self, message: str) -> None:
        raise AssertionError(message)

    def node_leaves(self, name: str, deadline: float) -> None:
        raise AssertionError(name)

    def worker_ready(self, name: str, info: WorkerInfo, seconds: float) -> None:
        self.ready.add(name)

    def worker_adopted(self, name: str) -> None:
        self.adopted.add(name)

    def worker_lost(self, name: str, cause: Cause) -> None:
        raise AssertionError(f"{name}: {cause}")

    def keeper_event(self, event: KeeperEvent) -> None:
        if isinstance(event, WorkerExited):
            self.exited.append(event)

    def progress_told(self) -> None:
        pass


class Counted(Replies):
    """Each message of the driver is one that it expects a reply to."""

    sent = 0

    def expect(self, reply: Any, take: Callable[[Any], None], fail: Callable[[Any], None]) -> None:
        self.sent += 1
        super().expect(reply, take, fail)


def answering() -> Any:
    """An actor class, made here so that it travels to nodes that don't have this file."""
    from elastictrain.runtime.watch import is_stopped

    class Answering:
        def __init__(self, worker: str, node: str, config: Any, folder: str, keeper: Any, host: str, token: bytes):
            self.worker, self.node, self.token = worker, node, token
            self.adopt(keeper)

        def adopt(self, keeper: Any) -> None:
            ray.get(keeper.enlist.remote(self.worker, os.getpid(), self.token))

        def warm(self, zero_stage: int) -> WorkerInfo:
            time.sleep(SLOW_S if self.worker == SLOW else 0)
            return WorkerInfo(self.worker, os.getpid(), self.node, "")

        def finds_stopped(self, pid: int) -> bool:
            return is_stopped(pid)

        def say(self, given: Any, own: int) -> tuple[str, Any, int]:
            return self.worker, given, own

        def wait(self, seconds: float) -> int:
            time.sleep(seconds)
            return os.getpid()

        def fail(self, error: Exception | None) -> None:
            if error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise error

    return ray.remote(max_concurrency=4)(Answering)


@dataclass
class Team:
    """Two workers on one node, and who asks them."""

    roster: Roster
    heard: Heard
    replies: Counted
    node: str
    workers: tuple[str, str] = ("worker-0", "worker-1")

    def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, self.heard
            self.roster.check()
            self.replies.wait(0.05)

    def ask(self, question: Question, own: dict[str, tuple[Any, ...]] | None = None) -> dict[str, Any]:
        """Fills up with each worker's answer, or with its failure."""
        found: dict[str, Any] = {}
        self.roster.questions.ask(question, self.workers, found.__setitem__, found.__setitem__, own=own)
        return found


@contextmanager
def watching(address: str, settings: dict[str, Any]) -> Iterator[Team]:
    ray.init(address, logging_level="error", log_to_driver=False)
    config = TrainConfig.from_dict(settings)
    heard, replies = Heard(), Counted()
    fleet = Fleet(config, secrets.token_bytes(32), worker_actor=answering())
    try:
        roster = Roster(fleet, replies, heard)
        team = Team(roster, heard, replies, "127.0.0.22")
        team.until(lambda: team.node in heard.nodes)
        for name in team.workers:
            roster.start(name, team.node, True, "")
        yield team
    finally:
        fleet.close()
        ray.shutdown()


@pytest.fixture
def team(shared_cluster: Any, tmp_path: Path) -> Iterator[Team]:
    settings = {"run": {"name": "questions", "storage": str(tmp_path)}}
    with watching(shared_cluster.address, settings) as team:
        team.until(lambda: len(team.heard.ready) == len(team.workers))
        yield team


def test_one_message_for_all_and_every_answer_comes(team: Team) -> None:
    first, second = team.workers
    before = team.replies.sent
    # a value that is kept in the driver's object store, and one that travels in the message
    found = team.ask(Question("say", (ray.put("kept"),), together=True), {first: (1,), second: (2,)})
    assert team.replies.sent == before + 1
    team.until(lambda: len(found) == 2)
    assert found == {first: (first, "kept", 1), second: (second, "kept", 2)}

    errors = {first: (ValueError("no such layer"),), second: (PeerLostError("a collective broke"),)}
    found = team.ask(Question("fail", together=True), errors)
    team.until(lambda: len(found) == 2)
    own, peer = found[first], found[second]
    assert (own.cause.kind, own.cause.message) == ("exception", "ValueError: no such layer")
    assert "in fail" in own.cause.traceback
    assert (own.unreachable, own.peers_lost, peer.unreachable, peer.peers_lost) == (False, False, False, True)

    found = team.ask(Question("fail", together=True), {first: (MemoryError("no room"),), second: (None,)})
    team.until(lambda: len(found) == 2 and team.heard.exited)
    assert found[first].cause.kind == "oom"
    assert isinstance(found[second], Failure)
    assert found[second].unreachable
    assert (team.heard.exited[0].worker, team.heard.exited[0].cause) == (second, Cause("signal", "SIGKILL"))


def test_a_keeper_that_dies_leaves_nobody_waiting(team: Team) -> None:
    again, once = team.ask(Question("wait", (2.0,), again=True)), team.ask(Question("wait", (2.0,)))
    keeper = team.roster.fleet.nodes[team.node].info
    assert keeper is not None
    team.until(lambda: len(team.roster.questions._open) == 4)
    os.kill(keeper.pid, signal.SIGKILL)
    team.until(lambda: len(again) == 2 and len(team.heard.adopted) == 2)
    assert [name for name, _ in team.heard.lost] == [team.node]
    assert again == {name: team.roster.fleet.workers[name].info.pid for name in team.workers}
    before = team.replies.sent
    found = team.ask(Question("wait", (0.0,), together=True))
    assert team.replies.sent == before + 1  # the next keeper relays
    team.until(lambda: len(found) == 2)
    assert found == again
    assert once == {}  # dropped, and nothing is left of it
    assert not team.roster.questions._open


def test_a_keeper_that_is_stopped_is_replaced_as_soon_as_that_is_known(team: Team) -> None:
    keeper = team.roster.fleet.nodes[team.node].info
    assert keeper is not None
    stopped_at = time.time()
    os.kill(keeper.pid, signal.SIGSTOP)
    team.until(lambda: len(team.heard.adopted) == 2)
    [(name, cause)] = team.heard.lost
    assert name == team.node
    assert cause.message.endswith("and another takes over: its process is stopped")
    [(_, pid, at)] = team.heard.keepers
    assert pid == keeper.pid
    assert abs(at - stopped_at) < STUCK_S / 2  # as it was then, not when it was found


def test_a_worker_that_warms_up_meanwhile_gets_the_next_keeper(team: Team) -> None:
    roster = team.roster
    roster.start(SLOW, team.node, False, "")
    team.until(lambda: team.roster.progress.get(SLOW))  # the keeper knows it
    info = roster.fleet.nodes[team.node].info
    assert info is not None
    os.kill(info.pid, signal.SIGKILL)
    team.until(lambda: len(team.heard.adopted) == 2)
    assert SLOW not in team.heard.ready
    team.until(lambda: SLOW in team.heard.ready)
    assert ray.get(roster.fleet.nodes[team.node].keeper.progress.remote()).keys() == {*team.workers, SLOW}
    assert SLOW not in team.heard.adopted


def test_nothing_is_left_of_a_node_that_is_refused(shared_cluster: Any, tmp_path: Path) -> None:
    settings = {
        "run": {"name": "questions", "storage": str(tmp_path)},
        "parallel": {"offload": "nvme", "offload_path": str(tmp_path / "drive")},
    }
    with watching(shared_cluster.address, settings) as team:
        team.until(lambda: len(team.heard.refused) == 2)
        told = f"node {team.node} is not used: its parallel.offload_path {tmp_path}/drive is no folder"
        assert team.heard.refused[team.node].startswith(told)
        assert not team.roster.fleet.nodes
        assert not team.roster.fleet.workers
        for _ in range(3):  # and it is left alone
            team.heard.nodes.clear()
            time.sleep(LOOK_EVERY_S)
            team.roster.check()
            team.replies.wait(0.1)
        assert not team.heard.nodes
        assert not team.heard.ready
