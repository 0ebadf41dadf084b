"""The live state of a run, kept up to date from events: what the terminal shows and `status.json` holds."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable

from elastictrain.config import TrainConfig
from elastictrain.control.state import State
from elastictrain.events import Event, FailureDetected, GenerationStarted, Recovered, RunEnded, StepCommitted
from elastictrain.plan.layout import Layout
from elastictrain.runtime.board import Progress
from elastictrain.runtime.fleet import Fleet
from elastictrain.status import NodeStatus, RunState, StandbyStatus, Status, WorkerStatus
from elastictrain.tracking.ledger import productive_s

PUBLISH_EVERY_S = 0.5
_RECENT_STEPS = 20


class Live:
    """Folds events; `publish` hands out a Status when one is due."""

    def __init__(
        self, config: TrainConfig, attempt: int, step: int, started_at: float, show: Callable[[Status], None]
    ) -> None:
        self._config, self.attempt, self._show = config, attempt, show
        self._started_at = started_at
        self.status: RunState = "preparing"
        self.message = ""
        self.step = step
        self.generation = 0
        self.loss: float | None = None
        self.lost_steps = 0
        self.last_recovery_s: float | None = None
        self._layout = ""
        self._world_size = 0
        self._productive_s = 0.0
        self._fault_at: float | None = None
        self._broken = -1
        """The generation that failed last."""
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RECENT_STEPS)
        """Seconds and tokens of the last steps."""
        self._published = 0.0

    def resume(self, productive_s: float, lost_steps: int) -> None:
        """Count what earlier attempts did."""
        self._productive_s, self.lost_steps = productive_s, lost_steps

    def fold(self, event: Event) -> None:
        """Take note of an event."""
        match event:
            case GenerationStarted():
                self.generation, self._world_size = event.index, event.world_size
                layout = event.layout
                self._layout = Layout.from_json(layout).degrees
                self._recent.clear()
                self.message = ""
            case StepCommitted():
                self.step = event.step
                if event.generation > self._broken:  # news of a generation's last steps comes after that of its end
                    self.status = "running"
                if event.skipped is None:
                    self.loss = event.loss
                seconds = productive_s(event)
                self._productive_s += seconds
                self._recent.append((seconds, event.num_tokens))
            case FailureDetected():
                self.status, self._fault_at, self._broken = "recovering", event.at, event.generation
            case Recovered():
                self.lost_steps += event.lost_steps
                # else it is the last driver's end that was healed, or a failure before the one that is under way
                if self._fault_at is not None and event.generation > self._broken:
                    self.last_recovery_s = event.at - self._fault_at
            case RunEnded():
                self.status = event.status
                if event.status == "failed" and event.cause is not None:
                    self.message = event.cause.message

    def publish(self, fleet: Fleet | None, state: State | None, progress: dict[str, Progress], force: bool) -> None:
        """Show the state if the last time was long enough ago."""
        now = time.time()
        if not force and now - self._published < PUBLISH_EVERY_S:
            return
        self._published = now
        workers: list[WorkerStatus] = []
        standbys: list[StandbyStatus] = []
        nodes: list[NodeStatus] = []
        if fleet is not None and state is not None:
            ranks = {name: rank for rank, name in enumerate(state.members)} if state.phase != "ended" else {}
            for name, handle in fleet.workers.items():
                at = progress.get(name)
                pid = handle.info.pid if handle.info else 0
                if name in ranks:
                    doing = (at.phase, at.step) if at else ("forming", self.step)
                    workers.append(WorkerStatus(ranks[name], name, pid, handle.node, *doing))
                elif handle.info is not None:
                    standbys.append(StandbyStatus(name, pid, handle.node))
            nodes = [NodeStatus(n.name, n.address, True) for n in fleet.nodes.values()]
        self._show(
            Status(
                run=self._config.run.name,
                status=self.status,
                attempt=self.attempt,
                step=self.step,
                steps=self._config.train.steps,
                world_size=self._world_size,
                layout=self._layout,
                generation=self.generation,
                loss=self.loss,
                tokens_per_s=self._tokens_per_s(),
                goodput=min(1.0, self._productive_s / max(now - self._started_at, 1e-9)),
                lost_steps=self.lost_steps,
                last_recovery_s=self.last_recovery_s,
                message=self.message,
                workers=tuple(sorted(workers, key=lambda w: w.rank)),
                standbys=tuple(standbys),
                nodes=tuple(nodes),
                driver_pid=os.getpid(),
                updated_at=now,
            )
        )

    def _tokens_per_s(self) -> float:
        seconds = sum(seconds for seconds, _ in self._recent)
        return sum(tokens for _, tokens in self._recent) / seconds if seconds else 0.0
