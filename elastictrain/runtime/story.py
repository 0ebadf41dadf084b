"""What happened, told once and in order: steps, failures, recoveries, generations. All events of a run pass here.

It remembers just what telling needs: the commits under way, the failures that no step has healed yet, and what the
current generation was restored from.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from elastictrain.control.vocabulary import Form
from elastictrain.events import (
    Cause,
    Continuation,
    Event,
    FailureDetected,
    GenerationStarted,
    LayoutChosen,
    Member,
    Recovered,
    StepCommitted,
    Warned,
)
from elastictrain.runtime.commits import CommitCollector
from elastictrain.runtime.protocol import RestoreFrom
from elastictrain.state.tensors import ShardHeader


@dataclass
class Story:
    """The events of one attempt. `record` gets each of them."""

    record: Callable[[Event], None]
    commits: CommitCollector
    restored: RestoreFrom
    restored_layout: dict[str, Any] | None
    """That the restored state was made under; None for a fresh start."""
    updated_step: int = 0
    """Highest step whose update some rank of the failed generation had done."""
    lost_steps: int | None = None
    """Of a failure that was told before, and that the first step heals: the last driver's death; None without one."""
    _told_layout: dict[str, Any] | None = None
    _lost_steps: int = 0
    _continuation: Continuation = "bit_exact"
    _unhealed: set[int] = field(default_factory=set)
    """Generations that failed and that no later one's first step has healed; -1 is the last driver's."""
    _first_step_pending: bool = False

    def __post_init__(self) -> None:
        if self.lost_steps is not None:
            self._unhealed, self._lost_steps = {-1}, self.lost_steps

    @property
    def step(self) -> int:
        """The last committed step."""
        return self.commits.step

    def warn(self, topic: str, message: str) -> None:
        """Tell the user something that stops nothing."""
        self.record(Warned(time.time(), topic, message))

    def fail(
        self,
        kind: str,
        cause: Cause,
        *,
        generation: int,
        ranks: tuple[int, ...] = (),
        node: str = "",
        pid: int = 0,
        at: float | None = None,
        step: int = 0,
    ) -> None:
        """A generation can't go on. `at` is when that happened, `step` the one in flight; both as far as known."""
        now = time.time()
        self._unhealed.add(generation)
        self.record(FailureDetected(at or now, now, generation, kind, ranks, node, pid, cause, step or self.step + 1))

    def commit(self, header: ShardHeader) -> tuple[list[StepCommitted], bool]:
        """Take one rank's snapshot: the steps that it completes, and whether they are the first of a generation."""
        steps = self.commits.add(header, time.time())
        first = bool(steps) and self._first_step_pending
        for event in steps:
            self.record(event)
            if self._first_step_pending:
                self._first_step_pending = False
                self._heal(event)
        for window in self.commits.pace.take():
            self.record(window)
        return steps, first

    def close(self) -> None:
        """Tell what was kept for later: no step comes any more."""
        self.commits.pace.close()
        for window in self.commits.pace.take():
            self.record(window)

    def restore(self, source: RestoreFrom, layout: dict[str, Any] | None) -> None:
        """The next generation starts from here; what was done beyond it is lost."""
        self.restored, self.restored_layout = source, layout
        # A failure before the first step adds to the one before.
        self._lost_steps = max(self._lost_steps, max(self.updated_step, self.step) - source.step)
        self.updated_step = 0

    def begin(
        self, order: Form, layout: dict[str, Any], members: tuple[Member, ...], phases_s: dict[str, float]
    ) -> None:
        """A generation trains from now on."""
        self._continuation = "bit_exact" if self.restored_layout in (None, layout) else "order_exact"
        self._first_step_pending = True
        self.commits.begin(order.generation, len(members), order.restore.step)
        self.record(
            GenerationStarted(
                at=time.time(),
                index=order.generation,
                layout=layout,
                world_size=len(members),
                first_step=order.restore.step + 1,
                cause=order.cause,
                source=order.restore.source,
                continuation=self._continuation,
                members=members,
                phases_s=phases_s,
            )
        )
        if layout != self._told_layout:
            self._told_layout, choice = layout, order.choice
            needs = choice.memory.device_bytes if choice.memory else None
            self.record(
                LayoutChosen(time.time(), order.generation, layout, choice.why, choice.runner_up, needs, choice.step_s)
            )

    def _heal(self, first: StepCommitted) -> None:
        """One recovery heals all failures since the last step, but for its own generation's, which are told early."""
        if min(self._unhealed, default=first.generation) < first.generation:
            self.record(
                Recovered(
                    at=first.finished_at,
                    generation=first.generation,
                    first_step=first.step,
                    lost_steps=self._lost_steps,
                    source=self.restored.source,
                    continuation=self._continuation,
                )
            )
        self._unhealed = {generation for generation in self._unhealed if generation >= first.generation}
        self._lost_steps = 0
