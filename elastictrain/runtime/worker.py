"""The worker: one actor a rank or standby. It lives as long as it can: a failure elsewhere costs it only its engine.

Two kinds of thread: actor calls come in on Ray's; everything of torch and DeepSpeed happens on the one training
thread. The training loop runs by itself; nobody sends a message per step.

    train:  for each step: next batches -> forward, backward -> wait for the last snapshot's copy and replicas
            -> update -> begin the next snapshot's copy in the background
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from elastictrain.checkpoint.arena import Arena
from elastictrain.config import TrainConfig
from elastictrain.errors import (
    BadLossError,
    InfrastructureError,
    PeerLostError,
    StaleGenerationError,
    StateCorruptedError,
    in_a_line,
)
from elastictrain.events import Cause
from elastictrain.runtime.allocator import keep_memory
from elastictrain.runtime.board import STACKS_AT, Board
from elastictrain.runtime.keeper import STACKS_SIGNAL
from elastictrain.runtime.protocol import Evaluation, FormOrder, FormReply, Outcome, RestoreFrom, WorkerInfo
from elastictrain.runtime.watch import is_stopped
from elastictrain.uncollected import uncollected

T = TypeVar("T")

WORKER_THREADS = 8
"""Control calls that may be under way beside the training thread."""

REMAINS_TIMEOUT_S = 20.0
"""How long a generation's engine and group may take to be gone: milliseconds, unless a GPU hangs."""


class Worker:
    """Runs as a Ray actor; see the module."""

    def __init__(
        self, worker: str, node: str, config: dict[str, Any], data_folder: str, keeper: Any, host: str, token: bytes
    ) -> None:
        keep_memory()
        self._worker, self._node, self._host, self._token = worker, node, host, token
        self._data_folder = Path(data_folder)
        self._config = TrainConfig.from_dict(config)
        self._board = Board(memoryview(b""))
        self._enlist(keeper)
        self._training = ThreadPoolExecutor(max_workers=1, thread_name_prefix="training")
        self._rank: Any = None
        self._info: WorkerInfo | None = None
        self._left: Future[None] | None = None
        self._joined = -1
        self._fenced = -1
        self._lock = threading.Lock()
        # The constructor runs on the main thread, after Ray has set a handler of its own.
        self._ray_handler = signal.signal(signal.SIGTERM, self._asked_to_leave)

    def adopt(self, keeper: Any) -> None:
        """Another keeper takes over the node; between generations."""
        self._enlist(keeper)
        if self._rank is not None:
            self._rank.adopt(keeper, self._commit_at)

    def _enlist(self, keeper: Any) -> None:
        self._keeper = keeper
        board, self._commit_at = ray.get(keeper.enlist.remote(self._worker, os.getpid(), self._token))
        self._board.move(Arena.open(board).buffer)
        self._stacks = open(f"/proc/{board.pid}/fd/{board.fd}", "r+b", buffering=0)  # noqa: SIM115 - open for life
        self._stacks.seek(STACKS_AT)
        # works whatever holds the interpreter's lock; its user asks once, and then ends the process
        faulthandler.register(STACKS_SIGNAL, self._stacks, all_threads=True)

    def warm(self, zero_stage: int) -> WorkerInfo:
        """Import everything, build and drop one engine, so that later ones cost milliseconds; once, however often."""
        return self._training.submit(_exit_is_an_error, lambda: self._warm(zero_stage)).result()

    def _warm(self, zero_stage: int) -> WorkerInfo:
        with uncollected():
            from elastictrain.runtime.rank import RankProgram

        if self._info is None:
            self._rank = RankProgram(
                self._config,
                self._data_folder,
                self._node,
                self._host,
                self._keeper,
                self._commit_at,
                self._token,
                self._board,
            )
            self._info = WorkerInfo(self._worker, os.getpid(), self._node, *self._rank.warm(zero_stage))
        return self._info

    def form(self, order: FormOrder, restore: RestoreFrom, rank: int) -> FormReply:
        """Join the group of a generation as this rank, build the engine, load the state."""
        if self._left is not None:
            # raises what went wrong with them, or TimeoutError; this process is replaced then
            self._left.result(REMAINS_TIMEOUT_S)
        self._joined = max(self._joined, order.generation)
        work = self._training.submit(self._guarded, order.generation, lambda: self._rank.form(order, restore, rank))
        reply: FormReply = work.result()
        return reply

    def train(self, generation: int) -> Outcome:
        """Train until the last step, a pause or a failure; says which."""
        return self._training.submit(self._train, generation).result()

    def _train(self, generation: int) -> Outcome:
        try:
            step = self._guarded(generation, self._rank.train)
            return Outcome("paused" if step < self._config.train.steps else "finished", step, time.time())
        except Exception as error:  # noqa: BLE001 - user code may raise anything; it goes to the supervisor whole
            return self._explain(error, generation)

    def _guarded(self, generation: int, work: Callable[[], Any]) -> Any:
        if generation < self._fenced:
            raise InterruptedError(f"generation {generation} was fenced")
        return _exit_is_an_error(work)

    def _explain(self, error: Exception, generation: int) -> Outcome:
        from elastictrain.engine.failures import classify
        from elastictrain.engine.out_of_memory import is_out_of_memory

        at, step = time.time(), self._board.read().step
        if generation < self._fenced:
            return Outcome("aborted", step, at)
        if isinstance(error, StateCorruptedError):
            with suppress(RayError):  # whatever becomes of the driver; a keeper that is gone has no state to distrust
                ray.get(self._keeper.distrust.remote(generation, error.trusted_step))
            cause = Cause("corrupted", str(error))
            return Outcome("corrupted", step, at, cause, error.ranks, error.trusted_step)
        text = "".join(traceback.format_exception(error))
        if isinstance(error, BadLossError):
            return Outcome("raised", step, at, Cause("bad_loss", str(error), "", type(error).__name__))
        line, _ = in_a_line(error)
        if is_out_of_memory(error):
            # the failed pass's activations live in its frames: free them now, not at some later collection
            traceback.clear_frames(error.__traceback__)
            return Outcome("raised", step, at, Cause("oom", line, text, type(error).__name__))
        if isinstance(classify(error), PeerLostError | RayError | InfrastructureError | StaleGenerationError):
            return Outcome("peers_broken", step, at, Cause("collective", line, text, type(error).__name__))
        return Outcome("raised", step, at, Cause("exception", line, text, type(error).__name__))

    def quiet(self, generation: int) -> None:
        """Leave everything below `generation`: break its collectives, wait until nothing is written any more.

        Engine and group are dropped while the supervisor looks for the state to go on with. One that comes late, by a
        keeper that hung, finds nothing of before.
        """
        if generation <= self._joined:
            return
        with self._lock:
            self._fenced = max(self._fenced, generation)
        if self._rank is not None:
            self._rank.abort()
            self._training.submit(self._rank.fall_silent).result()
            self._left = self._training.submit(self._rank.leave)

    def order(self, generation: int, news: str) -> None:
        """Have all ranks of this generation hear this after the same step; for rank 0. See RankProgram.order."""
        if self._rank is not None:
            self._rank.order(generation, news)

    def finds_stopped(self, pid: int) -> bool:
        """Whether another process on this node, its keeper say, is stopped."""
        return is_stopped(pid)

    def _asked_to_leave(self, *_: object) -> None:
        """SIGTERM: go on, and let the supervisor end this process when it can be spared; a second one ends it now."""
        signal.signal(signal.SIGTERM, self._ray_handler)
        self._keeper.leave.remote(self._worker, time.time())

    def evaluate(self, step: int, micro_batch: int) -> Evaluation:
        """The model of a durable checkpoint on held-out text."""
        evaluation: Evaluation = self._training.submit(self._rank.evaluate, step, micro_batch).result()
        return evaluation


def _exit_is_an_error(work: Callable[[], T]) -> T:
    """Where the user's code calls sys.exit: Ray would take that for the actor's own wish to go, and tell nobody."""
    try:
        return work()
    except SystemExit as error:
        raise RuntimeError(f"the model's code called sys.exit({error.code!r})") from error


WorkerActor = ray.remote(max_concurrency=WORKER_THREADS)(Worker)
