"""The live state of a run: what `status.json` in the run's folder holds, and what a terminal shows (pure).

The driver replaces the file whole, so a reader sees one moment of the run. `from_json` checks every field and leaves
out those it does not know, so an older program reads a newer file. Costs tens of microseconds each way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

RunState = Literal[
    "starting",
    "preparing",
    "running",
    "recovering",
    "waiting",
    "finishing",
    "complete",
    "stopped",
    "failed",
    "interrupted",
]
"""Where a run is: preparing (joining a cluster, and its data), starting its workers, running, recovering from a
failure, waiting for workers, writing its last state; the last four are ends. A reader says `starting` of a run that has
told nothing yet, and `interrupted` of one whose driver went without a word; no driver writes that."""

ENDED: frozenset[RunState] = frozenset({"complete", "stopped", "failed", "interrupted"})
"""States in which nobody works on the run."""


_NOBODY = (
    "no process is working on this run; submitted again, it goes on from memory where its cluster still has the state "
    "(elastic.orphan_timeout_s), else from the newest checkpoint"
)


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One rank of the current generation; of the last one while the next is being formed."""

    rank: int
    worker: str
    pid: int
    node: str
    state: str
    step: int


@dataclass(frozen=True, slots=True)
class StandbyStatus:
    """One warm spare worker."""

    worker: str
    pid: int
    node: str


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One Ray node that the run knows of."""

    node: str
    address: str
    alive: bool


@dataclass(frozen=True, slots=True)
class Status:
    """One moment of a run."""

    run: str
    status: RunState
    attempt: int
    step: int
    """Last committed step."""
    steps: int
    """Steps in the whole run."""
    world_size: int
    layout: str
    generation: int
    loss: float | None
    tokens_per_s: float
    """Of the last 20 steps, counting the seconds of compute and communication only, as the report does."""
    goodput: float
    """Share of the wall time that was training, 0 to 1."""
    lost_steps: int
    """Over the whole run."""
    last_recovery_s: float | None
    message: str
    """One line about what goes on now; may be empty."""
    workers: tuple[WorkerStatus, ...]
    standbys: tuple[StandbyStatus, ...]
    nodes: tuple[NodeStatus, ...]
    driver_pid: int
    updated_at: float
    """Unix time in seconds."""

    @classmethod
    def beginning(cls, run: str, at: float) -> Status:
        """Of a run that has told nothing of itself yet, at this unix time."""
        return cls(
            run=run,
            status="starting",
            attempt=1,
            step=0,
            steps=0,
            world_size=0,
            layout="",
            generation=0,
            loss=None,
            tokens_per_s=0.0,
            goodput=0.0,
            lost_steps=0,
            last_recovery_s=None,
            message="",
            workers=(),
            standbys=(),
            nodes=(),
            driver_pid=0,
            updated_at=at,
        )

    @property
    def ended(self) -> bool:
        """Whether the run's last attempt is over."""
        return self.status in ENDED

    def interrupted(self) -> Status:
        """The same moment of a run whose driver is gone: what its workers do now, nobody knows."""
        workers = tuple(replace(w, state="unknown") for w in self.workers)
        return replace(self, status="interrupted", workers=workers, message=_NOBODY)

    def taken_over(self) -> Status:
        """Of a run that another driver has begun to work on, which has told nothing yet: who was there is gone."""
        return replace(self, status="preparing", workers=(), standbys=(), nodes=(), message="")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON-able data; a loss that is infinite or no number becomes None, since JSON has no word for it."""
        finite = self.loss is not None and math.isfinite(self.loss)
        return {**_schema().dump_python(self), "loss": self.loss if finite else None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Status:
        """Inverse of `to_json`; raises ValueError naming the fields that are missing or wrong."""
        try:
            return _schema().validate_python(data)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ValueError(f"not the status of a run: {wrong}") from None


@cache
def _schema() -> TypeAdapter[Status]:
    return TypeAdapter(Status)
