"""The layout of a world of ranks, and which world sizes a job can run at.

The global batch never changes: global_batch = micro_batch x accumulation x dp. The micro-batch is fixed by the user
(it decides what is computed together, hence the float sums and the dropout masks), so accumulation is what adapts,
and a world size is legal when it divides the number of micro-batches in a step. Only a lack of memory makes the
micro-batch smaller, along `micro_batch_ladder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from elastictrain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Layout:
    """How one generation divides the work; all of its ranks are data-parallel."""

    dp: int
    zero_stage: int
    micro_batch: int
    accumulation: int

    @property
    def world_size(self) -> int:
        """Ranks in the group."""
        return self.dp

    @property
    def global_batch(self) -> int:
        """Sequences per step over all ranks."""
        return self.micro_batch * self.accumulation * self.dp

    def __str__(self) -> str:
        return f"dp{self.dp} zero{self.zero_stage} {self.micro_batch}x{self.accumulation}"

    def to_json(self) -> dict[str, Any]:
        """Plain fields, for journals and manifests."""
        return asdict(self)


def legal_world_sizes(global_batch: int, micro_batch: int, low: int, high: int) -> tuple[int, ...]:
    """World sizes within [low, high] at which a step comes out whole, ascending."""
    if global_batch % micro_batch:
        return ()
    micro_batches = global_batch // micro_batch
    return tuple(n for n in range(low, high + 1) if micro_batches % n == 0)


def plan_layout(world_size: int, *, global_batch: int, micro_batch: int, zero_stage: int) -> Layout:
    """The layout for this world size; raises ConfigError with the arithmetic when the batch does not come out whole."""
    if global_batch % micro_batch:
        raise ConfigError(
            f"train.global_batch {global_batch} is not a whole number of micro-batches: {global_batch} / "
            f"train.micro_batch {micro_batch} = {global_batch / micro_batch:g}. Make train.global_batch a multiple of "
            f"{micro_batch}, or change train.micro_batch."
        )
    micro_batches = global_batch // micro_batch
    if micro_batches % world_size:
        legal = legal_world_sizes(global_batch, micro_batch, 1, micro_batches)
        raise ConfigError(
            f"{world_size} workers can't share a step: train.global_batch {global_batch} / train.micro_batch "
            f"{micro_batch} = {micro_batches} micro-batches, and {micro_batches} / {world_size} = "
            f"{micro_batches / world_size:.4g} a worker. Legal world sizes are {', '.join(map(str, legal))}: set "
            f"elastic.max_workers to one of them, or change train.global_batch."
        )
    return Layout(world_size, zero_stage, micro_batch, micro_batches // world_size)


def micro_batch_ladder(global_batch: int, micro_batch: int, world_sizes: Sequence[int]) -> tuple[int, ...]:
    """The micro-batch, and what follows each time that memory runs out, down to 1.

    Each is the largest of at most half the one before at which a step still comes out whole in all these worlds (legal
    at `micro_batch`), so that a run with a smaller micro-batch can be resized just as before.
    """
    ladder = [micro_batch]
    while ladder[-1] > 1:
        half = ladder[-1] // 2
        ladder.append(next(m for m in range(half, 0, -1) if all(global_batch % (m * n) == 0 for n in world_sizes)))
    return tuple(ladder)


def best_world_size(available: int, *, global_batch: int, micro_batch: int, low: int, high: int) -> int | None:
    """The largest legal world size that `available` workers can fill, or None."""
    legal = legal_world_sizes(global_batch, micro_batch, low, min(high, available))
    return legal[-1] if legal else None
