"""The keeper: one actor a node, which remembers its ranks' state and watches their processes.

It outlives the workers: their snapshots lie in its memory, so a killed process costs no copy. Each committed snapshot
is sent on to the buddy's keeper on another node, so a lost node costs one copy back. It is also the node's only voice:
the supervisor hears of snapshots and deaths by one long poll a node, never by a message a rank. What it has to say to
several workers of the node comes by the keeper too, and so do their answers (see `questions`).

It outlives the driver too, as a detached actor. The next driver of the run finds it by name and has it `succeed`: old
workers end, the token changes, nothing of before is taken any more. So that no step is missing from the story then, it
keeps the header of every snapshot until the supervisor says that its step is on record. When no driver comes within
`elastic.orphan_timeout_s` it ends.
"""

from __future__ import annotations

import hmac
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray

from elastictrain.checkpoint.arena import Arena, ArenaTicket
from elastictrain.checkpoint.replicate import Address, ReplicaClient, ReplicaServer
from elastictrain.checkpoint.store import CheckpointStore
from elastictrain.checkpoint.vault import Vault
from elastictrain.errors import ElasticTrainError, InfrastructureError, StaleGenerationError
from elastictrain.events import Cause, NodeLoad
from elastictrain.runtime import preflight
from elastictrain.runtime.board import BOARD_BYTES, STACKS_AT, Board, Progress
from elastictrain.runtime.copies import Copies
from elastictrain.runtime.lifeline import Lifeline
from elastictrain.runtime.mailbox import Mailbox
from elastictrain.runtime.node_load import LoadMeter
from elastictrain.runtime.oom_kills import OomKills
from elastictrain.runtime.protocol import (
    Bequest,
    FaultAnnounced,
    FenceReply,
    Greeting,
    KeeperEvent,
    KeeperInfo,
    KeeperTerms,
    KeeperTrouble,
    LeaveAsked,
    Question,
    SaveReply,
    SnapshotHeld,
    WorkerExited,
)
from elastictrain.runtime.relay import relay
from elastictrain.runtime.watch import ProcessWatch, is_stopped
from elastictrain.state.manifest import ShardEntry
from elastictrain.state.tensors import LogicalTensor, ShardHeader, ShardIndex
from elastictrain.storage import Storage
from elastictrain.version import __version__

KEEPER_THREADS = 16
"""Calls that may wait at once: the supervisor's poll, durable writes, ranks that come and go."""
STACKS_SIGNAL = signal.SIGUSR1
STACKS_PATIENCE_S = 0.2
"""How long a worker has to write down its stacks; it takes a millisecond unless its machine is overloaded."""
GATHER_S = 0.5
"""How long news of a snapshot waits for more of it: a message to the supervisor costs about 2 ms of processor. A death
waits for nothing, nor does a snapshot that is to be made durable."""
REPLICA_TIMEOUT_S = 10.0
"""After so long without an answer a buddy counts as lost, and training goes on without it."""
LAST_WORKERS_S = 20.0
"""How long killed workers of an earlier driver may take to be gone: freeing much memory takes a while."""


class Keeper:
    """Runs as a Ray actor; see the module. Ranks commit over `checkpoint.replicate`: a call of Ray's costs more."""

    def __init__(self, run: str, node: str, storage: str, host: str, terms: KeeperTerms) -> None:
        self._node, self._terms = node, terms
        self._ray_id = ray.get_runtime_context().get_node_id()
        self._lifeline = Lifeline(terms.orphan_timeout_s, lambda: os._exit(0))
        self._vault = Vault(node)
        self._run = storage, run
        self._store = CheckpointStore(Storage.open(storage).run(run))
        self._mail: Mailbox[KeeperEvent] = Mailbox()
        # Told by both keepers, since a node that is lost takes what it had not told yet with it.
        self._server = ReplicaServer(
            self._vault,
            host,
            terms.token,
            on_put=self._received,
            on_commit=self._commit,
        )
        self._boards: dict[str, Arena] = {}
        self._pids: dict[str, int] = {}
        self._watch = ProcessWatch(self._exited)
        self._kills = OomKills()
        self._load = LoadMeter()
        self._lock = threading.Lock()
        self._gone = threading.Condition(self._lock)
        """Of a worker."""
        self._untold: dict[tuple[int, int, int], ShardHeader] = {}
        """Of snapshots whose step is not known to be on record, by generation, step and rank."""
        self._trusted: dict[int, int] = {}
        self._tensors: tuple[LogicalTensor, ...] = ()
        self._buddy: Address | None = None
        self._links: dict[int, ReplicaClient] = {}
        self._copies = Copies(self._vault)

    def describe(self, driver_time: float) -> KeeperInfo:
        """Who and where, and how the node looks; `driver_time` is the driver's unix time."""
        self._lifeline.hear()
        found = preflight.look(*self._run, driver_time, self._terms.offload_path)
        return KeeperInfo(self._node, os.getpid(), self._server.address, found)

    # ------------------------------------------------------------------------------------------ for the supervisor

    def poll(self, after: int, timeout_s: float, recorded_step: int) -> list[tuple[int, KeeperEvent]]:
        """Events since number `after`; waits for the first. All steps up to `recorded_step` are on record."""
        self._lifeline.hear()
        with self._lock:
            for key in [key for key in self._untold if key[1] <= recorded_step]:
                del self._untold[key]
        return self._mail.read(after, timeout_s, GATHER_S)

    def progress(self) -> dict[str, Progress]:
        """Where every worker of this node is."""
        self._lifeline.hear()
        with self._lock:  # a worker that exits takes its board along
            return {
                worker: replace(Board(board.buffer).read(), stopped=is_stopped(self._pids[worker]))
                for worker, board in self._boards.items()
            }

    def relay(self, question: Question, parts: list[tuple[int, Any, tuple[Any, ...]]]) -> None:
        """Ask these workers of the node for their part: (ticket, actor, own arguments); what they say is told later."""
        relay(question, parts, self._mail.put)

    def load(self) -> NodeLoad:
        """How busy this node is."""
        return self._load.look(self._node)

    def end(self, worker: str, stacks: bool) -> str:
        """Kill a worker that makes no progress; first, if `stacks`, have it write down where its threads are.

        A stopped process writes nothing, and ends none the less.
        """
        found = ""
        with self._lock:
            board, pid = self._boards.get(worker), self._pids.get(worker)
        if board is None or pid is None:
            return found
        with suppress(ProcessLookupError):
            if stacks:
                os.kill(pid, STACKS_SIGNAL)
                time.sleep(STACKS_PATIENCE_S)
                with self._lock:
                    written = bytes(board.buffer[STACKS_AT:]) if worker in self._boards else b""
                found = written.partition(b"\0")[0].decode(errors="replace")
            os.kill(pid, signal.SIGKILL)
        return found

    def set_buddy(self, address: Address | None) -> None:
        """Send replicas to this keeper from now on."""
        with self._lock:
            if address == self._buddy:
                return  # a copy may be on its way there
            self._buddy = address
            stale, self._links = self._links, {}
        for link in stale.values():
            link.close()

    def fence(self, generation: int, after: int) -> FenceReply:
        """Refuse everything below `generation` from now on, and tell what is held and whole.

        Ask when that generation's workers are quiet: what one is copying at this moment is lost.
        """
        progress = self.progress()
        self._vault.fence(generation)
        return FenceReply(tuple(self._vault.inventory(verify=True)), tuple(self._mail.read(after)), progress)

    def describe_state(self, tensors: tuple[LogicalTensor, ...]) -> None:
        """What the whole state consists of: who succeeds may have to write it down before anybody has loaded it."""
        self._tensors = tensors

    def release(self, before_generation: int) -> None:
        """Forget what older generations left: a newer one has its own snapshots."""
        self._vault.release(before_generation)

    def save(self, generation: int, step: int, ranks: list[int], world_size: int) -> SaveReply:
        """Write these ranks' shards of a step to storage; from the copy made when it was committed, if there is one."""
        with self._lifeline.busy(), ThreadPoolExecutor(max_workers=4) as pool:
            return SaveReply(tuple(pool.map(lambda rank: self._save(generation, step, rank, world_size), ranks)))

    def _save(self, generation: int, step: int, rank: int, world_size: int) -> ShardEntry:
        data, index = self._copies.take(generation, step, rank), self._vault.index(generation, rank)
        return self._store.write_shard(step, rank, world_size, index, data)

    # --------------------------------------------------------------------------------------------- for the next driver

    def greet(self) -> Greeting:
        """Who this is, and how long it has heard nothing of a driver; changes nothing."""
        return Greeting(__version__, self._lifeline.silent_s, self._vault.newest_generation)

    def succeed(self, terms: KeeperTerms, generation: int) -> Bequest:
        """Serve another driver, whose first generation this is: what is left of the last one ends, and is told.

        Raises InfrastructureError when the last one's workers don't end: what they write can't be told apart then.
        """
        with self._lifeline.busy():
            self._vault.fence(generation)
            self._lifeline.extend(terms.orphan_timeout_s)
            self._watch.kill()
            with self._lock:
                if not self._gone.wait_for(lambda: not self._pids, LAST_WORKERS_S):
                    raise InfrastructureError(f"workers {sorted(self._pids)} on node {self._node} can't be ended")
                self._terms = terms
            self._copies.clear()
            self._server.rekey(terms.token)
            self.set_buddy(None)
            held, events = self._vault.inventory(verify=True), self._mail.read(0)
            with self._lock:
                untold, trusted = tuple(self._untold.values()), dict(self._trusted)
        address, tensors = self._server.address, self._tensors
        return Bequest(self._node, self._ray_id, address, tuple(held), untold, tuple(events), trusted, tensors)

    # ------------------------------------------------------------------------------------------------- for workers

    def enlist(self, worker: str, pid: int, token: bytes) -> tuple[ArenaTicket, Address]:
        """Watch this worker's process from now on; the board to write progress on, and where to commit snapshots.

        Raises InfrastructureError for a worker of another driver's.
        """
        if not hmac.compare_digest(token, self._terms.token):
            raise InfrastructureError(f"{worker} belongs to a driver that the keeper of node {self._node} left")
        board = Arena.create(BOARD_BYTES)
        with self._lock:
            self._boards[worker], self._pids[worker] = board, pid
        self._kills.look()
        self._watch.add(worker, pid)
        return board.ticket, self._server.address

    def attach(self, generation: int, rank: int, world_size: int, index: ShardIndex) -> tuple[ArenaTicket, ArenaTicket]:
        """Two buffers for this rank's snapshots in this generation."""
        return self._vault.attach(generation, rank, world_size, index)

    def leave(self, worker: str, at: float) -> None:
        """This worker has been told to go."""
        self._mail.put(LeaveAsked(worker, at))

    def distrust(self, generation: int, after: int) -> None:
        """Memory of this generation was found corrupted: its states after this step are not to be used."""
        with self._lock:
            self._trusted[generation] = min(after, self._trusted.get(generation, after))

    def announce(self, index: int, step: int, rank: int) -> None:
        """A planned fault strikes next."""
        self._mail.put(FaultAnnounced(time.time(), index, step, rank))

    def _commit(self, header: ShardHeader, buffer: int) -> Callable[[], None]:
        """A snapshot is complete in that buffer, and counts from now on; what is returned gives the buddy its copy."""
        self._vault.commit(header, buffer)
        self._remember(header)
        durable = header.step % self._terms.durable_every == 0
        if durable:
            self._copies.add(header)
        return lambda: self._mail.put(SnapshotHeld(header, self._replicate(header)), urgent=durable)

    def _received(self, header: ShardHeader) -> None:
        self._remember(header)
        self._mail.put(SnapshotHeld(header, True), urgent=False)

    def _remember(self, header: ShardHeader) -> None:
        with self._lock:
            self._untold[header.generation, header.step, header.rank] = header

    def _replicate(self, header: ShardHeader) -> bool:
        with self._lock:
            buddy, link = self._buddy, self._links.get(header.rank)
        if buddy is None:
            return False
        try:
            if link is None:
                link = ReplicaClient(buddy, self._terms.token, timeout_s=REPLICA_TIMEOUT_S)
                with self._lock:
                    self._links[header.rank] = link
            index = self._vault.index(header.generation, header.rank)
            link.put(header, index, self._vault.view(header.generation, header.rank, header.step))
        except StaleGenerationError:
            return False
        except ElasticTrainError as error:
            with self._lock:
                self._links.pop(header.rank, None)
                given_up, self._buddy = self._buddy == buddy, None
            if given_up:
                self._mail.put(KeeperTrouble("replica", f"node {self._node} has no copy elsewhere for now: {error}"))
            return False
        return True

    def _exited(self, worker: str, at: float, cause: Cause) -> None:
        with self._lock:
            board = self._boards.pop(worker)
        progress = Board(board.buffer).read()
        cause = self._kills.explain(cause)
        self._mail.put(WorkerExited(worker, at, cause, progress.generation, progress.step, progress.phase))
        with self._lock:
            del self._pids[worker]
            self._gone.notify_all()
        board.close()


KeeperActor = ray.remote(num_cpus=0, max_concurrency=KEEPER_THREADS, enable_task_events=False)(Keeper)
# no task events: a long poll a second would fill the dashboard's list of tasks
