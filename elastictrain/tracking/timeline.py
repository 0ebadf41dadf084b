"""A run over its wall time, in equal parts, for plots (pure): where the time went, and the tokens trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elastictrain.events import StepCommitted
from elastictrain.tracking.ledger import BUCKETS, Goodput

PARTS = 120
"""Of the wall time: what a plot a hand wide can show."""


def timeline(parts: Sequence[Goodput], tokens: Sequence[float]) -> dict[str, Any]:
    """As the report has it; `tokens` are those of each of the `parts`."""
    used = [bucket for bucket in BUCKETS if any(part.run_us[bucket] for part in parts)]
    return {
        "part_s": sum(part.wall_s for part in parts) / len(parts),
        "seconds": {bucket: [part.seconds[bucket] for part in parts] for bucket in used},
        "tokens": tokens,
    }


class Spread:
    """The tokens of steps, in equal parts of the wall time; those of a step in several of them by its time in each."""

    def __init__(self, begun_at: float, wall_s: float, num_parts: int) -> None:
        self._begun_at, self._part_s = begun_at, wall_s / num_parts
        self.tokens = [0.0] * num_parts

    def add(self, step: StepCommitted) -> None:
        """One that stands."""
        if self._part_s <= 0:
            return
        last_part = len(self.tokens) - 1
        first, last = ((at - self._begun_at) / self._part_s for at in (step.begun_at, step.finished_at))
        if last <= first:
            self.tokens[min(max(int(last), 0), last_part)] += step.num_tokens
            return
        for part in range(min(max(int(first), 0), last_part), min(max(int(last), 0), last_part) + 1):
            inside = max(min(last, part + 1) - max(first, part), 0.0)
            self.tokens[part] += step.num_tokens * inside / (last - first)
