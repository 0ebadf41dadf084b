"""The keeper: one actor a node, which remembers its ranks' state and watches their processes.

It outlives the workers: their snapshots lie in its memory, so a killed process costs no copy. Each committed snapshot
is sent on to the buddy's keeper on another node, so a lost node costs one copy back. It is also the node's only voice:
the supervisor hears of snapshots and deaths by one long poll a node, never by a message a rank.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import ray

from elastictrain.checkpoint.arena import Arena, ArenaTicket
from elastictrain.checkpoint.replicate import Address, ReplicaClient, ReplicaServer
from elastictrain.checkpoint.store import CheckpointStore
from elastictrain.checkpoint.vault import Vault
from elastictrain.errors import ElasticTrainError, StaleGenerationError
from elastictrain.events import Cause
from elastictrain.runtime import preflight
from elastictrain.runtime.board import BOARD_BYTES, STACKS_AT, Board, Progress
from elastictrain.runtime.mailbox import Mailbox
from elastictrain.runtime.oom_kills import OomKills
from elastictrain.runtime.protocol import (
    FaultAnnounced,
    FenceReply,
    KeeperEvent,
    KeeperInfo,
    KeeperTrouble,
    LeaveAsked,
    SaveReply,
    SnapshotHeld,
    WorkerExited,
)
from elastictrain.runtime.watch import ProcessWatch, is_stopped
from elastictrain.state.manifest import ShardEntry
from elastictrain.state.tensors import ShardHeader, ShardIndex
from elastictrain.storage import Storage

KEEPER_THREADS = 16
"""Calls that may wait at once: the supervisor's poll, durable writes, ranks that come and go."""
STACKS_SIGNAL = signal.SIGUSR1
STACKS_PATIENCE_S = 0.2
"""How long a worker has to write down its stacks; it takes a millisecond unless its machine is overloaded."""
GATHER_S = 0.5
"""How long news of a snapshot waits for more of it: a message to the supervisor costs about 2 ms of processor. A death
waits for nothing."""
REPLICA_TIMEOUT_S = 10.0
"""After so long without an answer a buddy counts as lost, and training goes on without it."""


class Keeper:
    """Runs as a Ray actor; see the module. Ranks commit over `checkpoint.replicate`: a call of Ray's costs more."""

    def __init__(self, run: str, node: str, storage: str, token: bytes, host: str, durable_every: int) -> None:
        self._node, self._token, self._durable_every = node, token, durable_every
        self._vault = Vault(node)
        self._run = storage, run
        self._store = CheckpointStore(Storage.open(storage).run(run))
        self._mail: Mailbox[KeeperEvent] = Mailbox()
        # Told by both keepers, since a node that is lost takes what it had not told yet with it.
        self._server = ReplicaServer(
            self._vault,
            host,
            token,
            on_put=lambda header: self._mail.put(SnapshotHeld(header, True), urgent=False),
            on_commit=self._commit,
        )
        self._boards: dict[str, Arena] = {}
        self._pids: dict[str, int] = {}
        self._watch = ProcessWatch(self._exited)
        self._kills = OomKills()
        self._lock = threading.Lock()
        self._buddy: Address | None = None
        self._links: dict[int, ReplicaClient] = {}
        self._copies: dict[tuple[int, int, int], tuple[memoryview, float]] = {}

    def describe(self, driver_time: float) -> KeeperInfo:
        """Who and where, and how the node looks; `driver_time` is the driver's unix time."""
        found = preflight.look(*self._run, driver_time)
        return KeeperInfo(self._node, os.getpid(), self._server.address, found)

    # ------------------------------------------------------------------------------------------ for the supervisor

    def poll(self, after: int, timeout_s: float) -> list[tuple[int, KeeperEvent]]:
        """Events since number `after`; waits for the first."""
        return self._mail.read(after, timeout_s, GATHER_S)

    def progress(self) -> dict[str, Progress]:
        """Where every worker of this node is."""
        return {worker: self._progress(worker) for worker in list(self._boards)}

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
                found = bytes(board.buffer[STACKS_AT:]).partition(b"\0")[0].decode(errors="replace")
            os.kill(pid, signal.SIGKILL)
        return found

    def _progress(self, worker: str) -> Progress:
        with self._lock:
            board, pid = self._boards[worker], self._pids[worker]
        return replace(Board(board.buffer).read(), stopped=is_stopped(pid))

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

    def release(self, before_generation: int) -> None:
        """Forget what older generations left: a newer one has its own snapshots."""
        self._vault.release(before_generation)

    def save(self, generation: int, step: int, ranks: list[int], world_size: int) -> SaveReply:
        """Write these ranks' shards of a step to storage; from the copy made when it was committed, if there is one."""
        with ThreadPoolExecutor(max_workers=4) as pool:
            saved = list(pool.map(lambda rank: self._save(generation, step, rank, world_size), ranks))
        return SaveReply(tuple(entry for entry, _ in saved), max(stall_s for _, stall_s in saved))

    def _save(self, generation: int, step: int, rank: int, world_size: int) -> tuple[ShardEntry, float]:
        with self._lock:
            copy = self._copies.pop((generation, step, rank), None)
        data, stall_s = copy or (self._vault.pin(generation, rank, step), 0.0)
        index = self._vault.index(generation, rank)
        return self._store.write_shard(step, rank, world_size, index, data), stall_s

    # ------------------------------------------------------------------------------------------------- for workers

    def enlist(self, worker: str, pid: int) -> tuple[ArenaTicket, Address]:
        """Watch this worker's process from now on; the board to write progress on, and where to commit snapshots."""
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

    def announce(self, index: int, step: int, rank: int) -> None:
        """A planned fault strikes next."""
        self._mail.put(FaultAnnounced(time.time(), index, step, rank))

    def _commit(self, header: ShardHeader, buffer: int) -> Callable[[], None]:
        """A snapshot is complete in that buffer, and counts from now on; what is returned gives the buddy its copy."""
        self._vault.commit(header, buffer)
        if header.step % self._durable_every == 0:
            self._copy(header)
        return lambda: self._mail.put(SnapshotHeld(header, self._replicate(header)), urgent=False)

    def _copy(self, header: ShardHeader) -> None:
        """Keep this step's bytes for the durable writer, however far training goes on meanwhile."""
        begun = time.monotonic()
        data = self._vault.pin(header.generation, header.rank, header.step)
        with self._lock:
            for key in [k for k in self._copies if k[2] == header.rank]:
                del self._copies[key]
            self._copies[header.generation, header.step, header.rank] = data, time.monotonic() - begun

    def _replicate(self, header: ShardHeader) -> bool:
        with self._lock:
            buddy, link = self._buddy, self._links.get(header.rank)
        if buddy is None:
            return False
        try:
            if link is None:
                link = ReplicaClient(buddy, self._token, timeout_s=REPLICA_TIMEOUT_S)
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
            del self._pids[worker]
        progress = Board(board.buffer).read()
        cause = self._kills.explain(cause)
        self._mail.put(WorkerExited(worker, at, cause, progress.generation, progress.step, progress.phase))
        board.close()


KeeperActor = ray.remote(num_cpus=0, max_concurrency=KEEPER_THREADS, enable_task_events=False)(Keeper)
# no task events: a long poll a second would fill the dashboard's list of tasks
