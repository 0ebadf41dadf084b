"""A worker that trains nothing: it answers the supervisor as `elastictrain.runtime.worker` does, without torch.

It enlists with its node's keeper and writes on its board, so its death and its place are seen as any worker's. What
rank 0 announces to the others in a collective, it announces here by a file.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import ray

from elastictrain.checkpoint.arena import Arena
from elastictrain.runtime.board import Board
from elastictrain.runtime.protocol import FormOrder, FormReply, Outcome, RestoreFrom, WorkerInfo

LOOK_EVERY_S = 0.1
THREADS = 8


class LightWorker:
    """Runs as a Ray actor, in the place of `Worker`; its data folder is where announcements go."""

    def __init__(
        self, worker: str, node: str, config: dict[str, Any], data_folder: str, keeper: Any, host: str, token: bytes
    ) -> None:
        self._worker, self._node, self._token = worker, node, token
        self._announced = Path(data_folder)
        self._board = Board(memoryview(b""))
        self._fenced, self._changed = -1, threading.Condition()
        self.adopt(keeper)

    def adopt(self, keeper: Any) -> None:
        """Another keeper takes over the node."""
        board, _ = ray.get(keeper.enlist.remote(self._worker, os.getpid(), self._token))
        self._board.move(Arena.open(board).buffer)

    def warm(self, zero_stage: int) -> WorkerInfo:
        """There is nothing to warm up."""
        return WorkerInfo(self._worker, os.getpid(), self._node, "")

    def form(self, order: FormOrder, restore: RestoreFrom, rank: int) -> FormReply:
        """Take the rank."""
        if order.generation < self._fenced:
            raise InterruptedError(f"generation {order.generation} was fenced")
        self._board.write(order.generation, restore.step, "forming")
        return FormReply({}, ())

    def train(self, generation: int) -> Outcome:
        """Idle until the generation is fenced, or paused."""
        self._board.write(generation, 1, "data")
        with self._changed:
            while generation >= self._fenced:
                if (self._announced / f"pause-{generation}").exists():
                    self._board.write(generation, 1, "idle")
                    return Outcome("paused", 1, time.time())
                self._changed.wait(LOOK_EVERY_S)
        return Outcome("aborted", 1, time.time())

    def order(self, generation: int, news: str) -> None:
        """Announce a pause."""
        (self._announced / f"{news}-{generation}").touch()

    def quiet(self, generation: int) -> None:
        """Leave everything below this generation."""
        with self._changed:
            self._fenced = max(self._fenced, generation)
            self._changed.notify_all()


LightActor = ray.remote(max_concurrency=THREADS)(LightWorker)
