"""Where an attempt begins: from the keepers' memory, from the newest usable checkpoint, or afresh.

Memory counts where an earlier driver of the run died and its keepers did not, if what they hold goes on where the
journal ends and no checkpoint is newer. Steps that it holds and the journal lacks are told here, before anything else.
Checkpoints are read through, to verify them, only where one may be needed: a large one takes minutes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from elastictrain.checkpoint.store import CheckpointStore, StoredCheckpoint
from elastictrain.config import TrainConfig
from elastictrain.control.loss_guard import WINDOW, Seen
from elastictrain.data.order import EMPTY_CHAIN
from elastictrain.errors import CheckpointError
from elastictrain.events import (
    DRIVER_LOST,
    Cause,
    CheckpointRejected,
    CheckpointRemoved,
    CheckpointWritten,
    Event,
    FailureDetected,
    FaultInjected,
    GenerationStarted,
    RunStarted,
    StepCommitted,
    Warned,
)
from elastictrain.plan.layout import Layout
from elastictrain.runtime.durable import as_written
from elastictrain.runtime.estate import Estate
from elastictrain.runtime.inherit import Heir, find_heir
from elastictrain.runtime.protocol import FaultAnnounced, RestoreFrom
from elastictrain.state.tensors import LogicalTensor
from elastictrain.tracking.attempts import split_attempts
from elastictrain.tracking.committed import committed_steps, doubt, written_checkpoints
from elastictrain.tracking.event_log import EventLog
from elastictrain.tracking.in_force import layout_in_force

Emit = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Remembered:
    """What the keepers' memory brings along that a checkpoint's manifest would."""

    loss: float
    scalars: Mapping[str, int | float]
    tensors: tuple[LogicalTensor, ...]
    """All of the state's; empty where nobody has told the keepers."""
    layouts: Mapping[int, dict[str, Any]]
    """Of the generations that the memory has something of."""
    trusted: Mapping[int, int]
    """The last step of each of them that may be used."""


@dataclass(frozen=True, slots=True)
class StartPoint:
    """Where an attempt begins."""

    restore: RestoreFrom
    sample_chain: str
    layout: dict[str, Any] | None
    """That the state was made under; None for a fresh start."""
    generation: int
    fired: frozenset[int]
    """Planned faults that struck in earlier attempts."""
    in_force: Layout | None
    """That of the newest generation, if the config is still the same in what memory depends on."""
    seen: tuple[Seen, ...] = ()
    """What is recorded of the last steps, up to the restored state's."""
    remembered: Remembered | None = None
    """Where the state comes from memory."""
    lost_steps: int | None = None
    """Finished steps that have to be done again, where the last attempt's driver died."""


def next_generation(earlier: Sequence[Event]) -> int:
    """The first that no attempt is known to have had."""
    return max((e.index for e in earlier if isinstance(e, GenerationStarted)), default=-1) + 1


def start_point(
    config: TrainConfig,
    earlier: Sequence[Event],
    estate: Estate | None,
    recorded: Callable[[], dict[int, str] | None],
    store: CheckpointStore,
    emit: Emit,
) -> StartPoint:
    """Where to begin after these events, the newest of which are this attempt's own.

    `recorded` asks MLflow for its checkpoints, as for `newest_usable`; a first attempt asks nobody.
    """
    told = EventLog(earlier)

    def tell(event: Event) -> None:
        told.append(event)
        emit(event)

    death = driver_death(earlier)
    if death is not None:
        tell(death)
    heir = _heir(config, earlier, estate)
    found = None
    if heir is None or heir.state.step < max(store.steps(), default=0):
        found = _durable(earlier, recorded, store, tell, spare=heir is not None)
    if heir is not None and found is not None and found.step > heir.state.step:
        heir = None
    struck = {(e.index, e.step) for e in earlier if isinstance(e, FaultInjected)}
    for event in _untold(config, estate, heir, struck):
        tell(event)
    newest = next_generation(earlier) - 1
    fired = frozenset(e.index for e in told if isinstance(e, FaultInjected))
    start = StartPoint(
        restore=RestoreFrom("fresh", 0),
        sample_chain=EMPTY_CHAIN,
        layout=None,
        generation=max(newest + 1, estate.generation if estate else 0),
        fired=fired,
        in_force=layout_in_force(earlier, config),
    )
    standing = committed_steps(told).by_step
    if heir is not None and estate is not None:
        start = _from_memory(start, heir, estate, standing, told)
        if found is None and (untold := _untold_checkpoint(told, store)) is not None:
            tell(untold)
    elif found is not None:
        manifest = found.manifest
        restore = RestoreFrom("durable", found.step)
        start = replace(start, restore=restore, sample_chain=manifest.sample_chain, layout=dict(manifest.layout))
    step = start.restore.step
    last = deque((s for s in standing if s <= step), WINDOW)
    seen = tuple((standing[s].loss, standing[s].skipped is not None) for s in last)
    done = max([*standing, estate.updated_step(newest) if estate else 0], default=0)
    return replace(start, seen=seen, lost_steps=max(done - step, 0) if death else None)


def driver_death(events: Sequence[Event]) -> FailureDetected | None:
    """What to tell of the last driver that trained, if it went without a word; the newest event is of this attempt."""
    trained = [a for a in split_attempts(events)[:-1] if any(isinstance(e, GenerationStarted) for e in a.events)]
    if not trained or trained[-1].ending is not None:
        return None
    last, started = trained[-1], trained[-1].events[0]
    assert isinstance(started, RunStarted)
    pid = started.environment.get("pid", "")
    steps = committed_steps(events).standing
    return FailureDetected(
        at=last.ended_at,
        detected_at=time.time(),
        generation=max(e.index for e in last.events if isinstance(e, GenerationStarted)),
        kind=DRIVER_LOST,
        ranks=(),
        node=started.environment.get("host", ""),
        pid=int(pid) if pid.isdigit() else 0,
        cause=Cause(
            "unknown", "the driver went without a word: killed, its machine is gone, or it could not write its end"
        ),
        step=steps[-1].step + 1 if steps else 1,
    )


def _heir(config: TrainConfig, earlier: Sequence[Event], estate: Estate | None) -> Heir | None:
    """What memory has. The run's last step is done again where it is there: the end of the run comes with it."""
    if estate is None:
        return None
    return find_heir(earlier, estate.states(), estate.headers(), before=config.train.steps)


def _untold(
    config: TrainConfig, estate: Estate | None, heir: Heir | None, struck: Collection[tuple[int, int]]
) -> Iterator[Event]:
    """What the last driver did not live to tell: faults that struck, and the steps up to the state to go on from."""
    for event in estate.events() if estate else ():
        match event:
            case FaultAnnounced(at, index, step, rank) if (index, step) not in struck and index < len(config.faults):
                yield FaultInjected(at, index, step, rank, config.faults[index].kind)
    if heir is not None:
        yield from heir.untold


def _durable(
    earlier: Sequence[Event],
    recorded: Callable[[], dict[int, str] | None],
    store: CheckpointStore,
    emit: Emit,
    spare: bool,
) -> StoredCheckpoint | None:
    """The newest usable checkpoint that there is. Without a usable one memory will do, where there is `spare`."""
    if len(split_attempts(earlier)) < 2 and not written_checkpoints(earlier):
        return None
    try:
        return newest_usable(earlier, recorded(), store, emit)
    except CheckpointError as error:
        if not spare:
            raise
        emit(Warned(time.time(), "checkpoint", f"{error} The run goes on from memory."))
        return None


def _untold_checkpoint(told: Sequence[Event], store: CheckpointStore) -> CheckpointWritten | None:
    """The newest checkpoint, if the last driver completed it and did not live to tell."""
    newest = next(iter(store.list()), None)
    if newest is None or newest.step in written_checkpoints(told) or doubt(told, newest.manifest):
        return None
    return as_written(newest, time.time())


def _from_memory(
    start: StartPoint, heir: Heir, estate: Estate, standing: Mapping[int, StepCommitted], told: Sequence[Event]
) -> StartPoint:
    state = heir.state
    shards = tuple(estate.shards[shard] for shard in state.shards)
    layouts = {e.index: e.layout for e in told if isinstance(e, GenerationStarted)}
    held = {shard.generation for shard in estate.shards}
    return replace(
        start,
        restore=RestoreFrom("memory", state.step, shards),
        sample_chain=standing[state.step].sample_chain,
        layout=layouts[state.generation],
        remembered=Remembered(
            loss=standing[state.step].loss,
            scalars=shards[0].stored.header.scalars,
            tensors=estate.tensors,
            layouts={generation: layouts[generation] for generation in held & layouts.keys()},
            trusted={generation: state.step if generation == state.generation else -1 for generation in held},
        ),
    )


def newest_usable(
    earlier: Sequence[Event], recorded: dict[int, str] | None, store: CheckpointStore, emit: Emit
) -> StoredCheckpoint | None:
    """The checkpoint to go on from, None where none was ever completed; what is newer and can't be used is set aside.

    `recorded` is MLflow's word (SHA-256 by step), None when it can't be asked: then the journal's counts. Raises
    CheckpointError when there are checkpoints and none can be used.
    """
    if recorded is None:
        emit(Warned(time.time(), "resume", "MLflow can't be asked which checkpoint to use: the journal decides"))
        recorded = written_checkpoints(earlier)

    def reject(step: int, uri: str, problem: str) -> None:
        emit(CheckpointRejected(time.time(), step, uri, problem))

    found = store.take_newest(recorded, reject, partial(doubt, earlier))
    if found is None:
        return None
    if found.step not in recorded:
        emit(as_written(found, time.time()))
    for step in sorted(recorded.keys() - store.steps()):
        if step < found.step:  # removed, by a process that did not live to tell
            emit(CheckpointRemoved(time.time(), step, store.uri(step)))
    return found
