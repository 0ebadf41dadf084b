"""A run over its wall time, in equal parts, for plots (pure): where the time went, and the tokens trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elastictrain.events import StepCommitted
from elastictrain.tracking.ledger import BUCKETS, Goodput

PARTS = 120
"""Of the wall time: what a plot a hand wide can show."""


def timeline(parts: Sequence[Goodput], steps: Sequence[StepCommitted], begun_at: float) -> dict[str, Any]:
    """As the report has it; `steps` are those that stand, `parts` cut the time from `begun_at` on."""
    wall_s = sum(part.wall_s for part in parts)
    used = [bucket for bucket in BUCKETS if any(part.run_us[bucket] for part in parts)]
    return {
        "part_s": wall_s / len(parts),
        "seconds": {bucket: [part.seconds[bucket] for part in parts] for bucket in used},
        "tokens": _spread(steps, begun_at, wall_s, len(parts)),
    }


def _spread(steps: Sequence[StepCommitted], begun_at: float, wall_s: float, num_parts: int) -> list[float]:
    """Tokens in each part; those of a step that lies in several, by its time in each."""
    tokens = [0.0] * num_parts
    part_s = wall_s / num_parts
    if part_s <= 0:
        return tokens
    for step in steps:
        first, last = ((at - begun_at) / part_s for at in (step.begun_at, step.finished_at))
        if last <= first:
            tokens[min(max(int(last), 0), num_parts - 1)] += step.num_tokens
            continue
        for part in range(min(max(int(first), 0), num_parts - 1), min(max(int(last), 0), num_parts - 1) + 1):
            inside = max(min(last, part + 1) - max(first, part), 0.0)
            tokens[part] += step.num_tokens * inside / (last - first)
    return tokens
