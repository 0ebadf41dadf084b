"""Putting steps together: a step is committed when every rank's snapshot of it is held (pure).

Ranks tell of their steps through their keepers, in any order and, after a failure, once more through the inventory.
The collector gives out each step once, in order, with the loss averaged in global micro-batch order, so that the value
does not depend on how the ranks were laid out.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from statistics import fmean

from elastictrain.control.loss_guard import WINDOW, Seen, mean_loss
from elastictrain.data.order import chain
from elastictrain.events import StepCommitted, Waits
from elastictrain.runtime.pace import Pace
from elastictrain.runtime.protocol import StepRecord, unpack_records
from elastictrain.state.tensors import ShardHeader


class CommitCollector:
    """Collects shard headers of one generation after another."""

    def __init__(self, step: int, sample_chain: str, seen: Sequence[Seen] = ()) -> None:
        """`seen` is what was recorded of the last steps up to this one."""
        self.step = step
        self.chains: dict[int, str] = {step: sample_chain}
        self.losses: dict[int, float] = {}
        self.own_s: dict[int, deque[float]] = {}
        """Seconds of each rank's own work in the last steps of this generation."""
        self.scalars: dict[int, Mapping[str, int | float]] = {}
        """Of the state after each step of which there was a snapshot."""
        self.pace = Pace()
        """How long the ranks of the committed steps worked."""
        self._seen = dict(enumerate(seen, start=step - len(seen) + 1))
        self._generation = -1
        self._world_size = 0
        self._held: dict[int, set[int]] = defaultdict(set)
        self._records: dict[int, dict[int, StepRecord]] = defaultdict(dict)

    def recall(self, loss: float, scalars: Mapping[str, int | float]) -> None:
        """What is known besides of the step that all begins with, where its state is in memory."""
        self.losses[self.step], self.scalars[self.step] = loss, scalars

    def begin(self, generation: int, world_size: int, step: int, sample_chain: str | None = None) -> None:
        """A generation goes on from the state after `step`; `sample_chain` where it isn't known from before."""
        self._generation, self._world_size, self.step = generation, world_size, step
        if sample_chain is not None:
            self.chains[step] = sample_chain
        self._held.clear()
        self._records.clear()
        self.own_s = {rank: deque(maxlen=_RECENT) for rank in range(world_size)}

    def seen_before(self, step: int) -> tuple[Seen, ...]:
        """What a guard must know to go on at this step."""
        return tuple(self._seen[s] for s in range(step - WINDOW, step) if s in self._seen)

    def add(self, header: ShardHeader, now: float) -> list[StepCommitted]:
        """Take one rank's snapshot; returns the steps that it completes, in order."""
        if header.generation != self._generation or header.step <= self.step:
            return []
        self._held[header.step].add(header.rank)
        self.scalars[header.step] = header.scalars
        for record in unpack_records(header.note):
            self._records[record.step][header.rank] = record
        complete = max(
            (step for step, ranks in self._held.items() if len(ranks) == self._world_size), default=self.step
        )
        steps = range(self.step + 1, complete + 1)
        if not all(len(self._records[step]) == self._world_size for step in steps):
            return []  # what a rank told of an earlier step is still on its way
        return [self._commit(step, now) for step in steps]

    def _commit(self, step: int, now: float) -> StepCommitted:
        records = [self._records[step][rank] for rank in range(self._world_size)]
        begun_at, finished_at = min(r.begun_at for r in records), max(r.finished_at for r in records)
        for rank, record in enumerate(records):
            self.own_s[rank].append(record.own_s)
        self.pace.step(self._generation, step, begun_at, finished_at, [record.own_s for record in records])
        micro_batches = sorted(m for r in records for m in r.micro_batches)
        samples = [sample for _, _, ids in micro_batches for sample in ids]
        losses = [loss for _, loss, _ in micro_batches]
        self.chains[step] = chain(self.chains[step - 1], samples)
        self.losses[step] = mean_loss(losses)
        self._seen[step] = self.losses[step], records[0].skipped is not None
        for remembered in (self.chains, self.losses, self.scalars, self._seen):
            remembered.pop(step - _REMEMBERED, None)
        self.step = step
        self._records.pop(step)
        self._held.pop(step, None)
        return StepCommitted(
            at=now,
            generation=self._generation,
            step=step,
            loss=self.losses[step],
            sample_chain=self.chains[step],
            num_samples=len(samples),
            num_tokens=sum(r.num_tokens for r in records),
            begun_at=begun_at,
            finished_at=finished_at,
            learning_rate=records[0].learning_rate,
            grad_norm=records[0].grad_norm,
            data_wait_s=max(r.data_wait_s for r in records),
            snapshot_stall_s=max(r.snapshot_stall_s for r in records),
            skipped=records[0].skipped,
            gauges={name: fmean(r.gauges[name] for r in records) for name in records[0].gauges},
            waits=Waits(
                data_s=fmean(r.data_wait_s for r in records),
                peers_s=fmean(r.blocked_s for r in records),
                snapshot_s=fmean(r.snapshot_stall_s for r in records),
            ),
        )


_RECENT = 20
"""Steps whose own work is kept."""
_REMEMBERED = 10_000
"""Steps whose chain is kept: a restore from memory goes back one, a durable one brings its own."""
