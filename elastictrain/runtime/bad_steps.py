"""What a rank does about a step that must not count: stop, skip it, or roll back to a checkpoint and skip.

    stop      raise BadLossError: the run ends with the state before this step
    skip      nothing: the engine has made no update, and the snapshot of this step is that of the one before
    rollback  load the newest durable checkpoint of an earlier step: the snapshot of this step has its state

Either way the step commits as every other does, samples, weights and verdict in one snapshot: who dies before the
commit does the step again and, from the same losses, comes to the same verdict. All ranks act alike without asking;
only the checkpoint is chosen by rank 0. A checkpoint that is due before this step and still being written is waited
for, so that the choice does not depend on the speed of a disk.

Cost: the guard's (see `control.loss_guard`); a roll-back reads the checkpoint twice, once to verify it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from elastictrain.checkpoint.store import CheckpointStore
from elastictrain.config import TrainConfig
from elastictrain.control.loss_guard import LossGuard, Seen, mean_loss
from elastictrain.engine.base import Engine, StepResult
from elastictrain.engine.group import RankGroup
from elastictrain.errors import BadLossError
from elastictrain.events import Skip

CHECKPOINT_PATIENCE_S = 30.0
"""How long a roll-back waits for a checkpoint that is due; one that could not be written never comes."""
_POLL_S = 0.05


class BadSteps:
    """One rank's judge in one generation; `seen` is what was recorded of the steps before its first."""

    def __init__(
        self, config: TrainConfig, seen: Sequence[Seen], engine: Engine, group: RankGroup, store: CheckpointStore
    ) -> None:
        self._guard = LossGuard(config.train, seen)
        self._spikes_ignored = config.train.on_spike == "ignore"
        self._every = config.checkpoint.every
        self._engine, self._group, self._store = engine, group, store

    @property
    def loss_limit(self) -> float | None:
        """For the engine's next step; None when spikes are ignored."""
        return None if self._spikes_ignored else self._guard.limit

    def settle(self, step: int, result: StepResult) -> Skip | None:
        """See to the step that the engine has done; None when it counts. Raises BadLossError to stop the run."""
        verdict = self._guard.judge(step, mean_loss(result.known_losses), result.updated)
        if verdict is None:
            return None
        if verdict.action == "stop":
            raise BadLossError(verdict.message)
        first_step = self._roll_back(step) + 1 if verdict.action == "rollback" else step
        return Skip(verdict.reason, verdict.limit if verdict.reason == "spike" else None, first_step)

    def _roll_back(self, step: int) -> int:
        """Put an earlier state back; its step, the one before this while there is no checkpoint yet."""
        chosen = self._group.from_rank_0(lambda: checkpoint_before(self._store, step, self._every) or 0)
        if not chosen:
            return step - 1
        self._engine.import_state(self._store.open(chosen))
        return chosen


def checkpoint_before(
    store: CheckpointStore, step: int, every: int, patience_s: float = CHECKPOINT_PATIENCE_S
) -> int | None:
    """The newest whole checkpoint of a step before this one; waits for the last that is due every so many steps.

    Raises CheckpointError when there are some and none is whole.
    """
    due = (step - 1) // every * every
    deadline = time.monotonic() + patience_s
    while due > _newest(store, step) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if not _newest(store, step):
        return None
    found = store.newest_verified({}, lambda *_: None, lambda manifest: "" if manifest.step < step else "it is newer")
    return found.step if found else None


def _newest(store: CheckpointStore, before: int) -> int:
    return max((stored.step for stored in store.list() if stored.step < before), default=0)
