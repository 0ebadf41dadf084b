"""Which remembered state goes on where the journal ends, and the steps that the journal lacks on the way there (pure).

A driver that is killed leaves a journal that ends somewhere, and keepers whose memory may be some steps further, or
behind where a node went too. A state (generation g, step s) continues the run when

    s is in the journal:      as a step of g, with the loss and the samples that the state's own records give
    s is beyond the journal:  g is the journal's newest generation, and the ranks' records fill every step between

so that each step is told exactly once, and a state that the journal took back (a later generation went on from before
it) is left alone. Everything else is for the durable checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from elastictrain.control.restore import MemoryState
from elastictrain.data.order import EMPTY_CHAIN
from elastictrain.events import Event, GenerationStarted, StepCommitted
from elastictrain.runtime.commits import CommitCollector
from elastictrain.runtime.protocol import unpack_records
from elastictrain.state.tensors import ShardHeader
from elastictrain.tracking.committed import committed_steps


@dataclass(frozen=True, slots=True)
class Heir:
    """The state to go on from, and the steps up to it that have not been told."""

    state: MemoryState
    untold: tuple[StepCommitted, ...]


def find_heir(
    earlier: Sequence[Event], states: Iterable[MemoryState], headers: Iterable[ShardHeader], before: int
) -> Heir | None:
    """The first of these states, of a step below `before`, that continues the journal.

    `headers` are of these states and of any other snapshots that are known of.
    """
    told = committed_steps(earlier).by_step
    newest = max((e.index for e in earlier if isinstance(e, GenerationStarted)), default=None)
    by_generation: dict[int, list[ShardHeader]] = {}
    for header in headers:
        by_generation.setdefault(header.generation, []).append(header)
    for state in states:
        known = by_generation.get(state.generation, [])
        if state.step >= before:
            continue
        if state.step in told:
            if _agrees(state, told, [h for h in known if h.step == state.step]):
                return Heir(state, ())
        elif state.generation == newest:
            untold = _replay(state, max(told, default=0), told, known)
            if untold is not None:
                return Heir(state, untold)
    return None


def _agrees(state: MemoryState, told: Mapping[int, StepCommitted], own: Sequence[ShardHeader]) -> bool:
    """Whether the records in the state's headers give the steps that are told."""
    first = min((record.step for header in own for record in unpack_records(header.note)), default=state.step)
    replayed = _replay(state, first - 1, told, own)
    return replayed is not None and all(
        told[step.step].generation == state.generation
        and repr(step.loss) == repr(told[step.step].loss)  # repr: NaN is NaN
        and step.sample_chain == told[step.step].sample_chain
        for step in replayed
    )


def _replay(
    state: MemoryState, base: int, told: Mapping[int, StepCommitted], headers: Sequence[ShardHeader]
) -> tuple[StepCommitted, ...] | None:
    """The steps after `base` up to the state's, from the ranks' records; None when some are missing."""
    if base and base not in told:
        return None
    chain = told[base].sample_chain if base else EMPTY_CHAIN
    collector = CommitCollector(base, chain)
    collector.begin(state.generation, len(state.shards), base)
    steps: list[StepCommitted] = []
    for header in sorted(headers, key=lambda h: h.step):
        if header.step <= state.step and header.world_size == len(state.shards):
            steps += collector.add(header, 0.0)
    if collector.step != state.step:
        return None
    return tuple(replace(step, at=step.finished_at) for step in steps)
