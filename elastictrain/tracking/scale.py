"""Where data lies on the paper (pure): scales, round ticks, fewer points, labels that do not cover each other."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Container, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

MAX_POINTS = 2000
"""Of a line."""
MAX_MARKS = 400
"""Of one kind of event: two or three pixels of a wide picture."""
STRIP_HEIGHT = 44
ROW_HEIGHT = 20
MAX_ROWS = 3
TEXT_WIDTH = 7.0
"""Of one character at 12 px, for keeping labels apart."""

Point = tuple[float, float]


class Frame:
    """Where data lies on the paper."""

    def __init__(self, report: dict[str, Any], width: int, height: int, rows: int) -> None:
        self.left, self.right = 48.0, width - 18.0
        self.top = 14.0 + rows * ROW_HEIGHT
        self.bottom = height - STRIP_HEIGHT - 52.0
        self.strip_top, self.strip_bottom = self.bottom + 18.0, self.bottom + 18.0 + STRIP_HEIGHT
        failed = [f["step"] for f in report["failures"] if f["step"] > report["steps"] + 1]  # and undone since
        self.last_step: int = max(report["steps"], 2, *failed)
        finite = [value for _, value in report["loss"] if math.isfinite(value)]
        low, high = (float(min(finite)), float(max(finite))) if finite else (0.0, 1.0)
        margin = (high - low) * 0.06 or max(abs(high) * 0.05, 0.5)
        self.low, self.high = low - margin, high + margin

    def x(self, step: float) -> float:
        """Of a step, from 1 to the last."""
        share = (min(max(step, 1), self.last_step) - 1) / (self.last_step - 1)
        return self.left + share * (self.right - self.left)

    def y(self, loss: float) -> float:
        """Of a loss."""
        return self.bottom - (loss - self.low) / (self.high - self.low) * (self.bottom - self.top)


def downsample(points: Sequence[Point], limit: int = MAX_POINTS, beside: Container[float] = ()) -> list[Point]:
    """At most `limit` finite points that keep the first, the last, and each bucket's lowest and highest.

    More are those whose x is in `beside`, and the first of each bucket's that is not finite: the line breaks there.
    """
    if len(points) <= limit:
        return list(points)
    kept = [points[0]]
    buckets = (limit - 2) // 2
    inner = points[1:-1]
    for b in range(buckets):
        bucket = inner[b * len(inner) // buckets : (b + 1) * len(inner) // buckets]
        finite = [p for p in bucket if math.isfinite(p[1])]
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else set()
        breaks = next(([p] for p in bucket if not math.isfinite(p[1])), [])
        kept += sorted(ends.union(breaks, (p for p in finite if p[0] in beside)), key=lambda p: p[0])
    return [*kept, points[-1]]


def gather(items: Sequence[T], x: Callable[[T], float], limit: int = MAX_MARKS) -> list[list[T]]:
    """At most `limit` groups, from left to right: each alone while that is enough, else those that lie together."""
    ordered = sorted(items, key=x)
    if len(ordered) <= limit:
        return [[item] for item in ordered]
    left, right = x(ordered[0]), x(ordered[-1])
    groups: dict[int, list[T]] = defaultdict(list)
    for item in ordered:
        groups[min(int((x(item) - left) / (right - left or 1.0) * limit), limit - 1)].append(item)
    return [*groups.values()]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def label_box(x: float, label: str, left: float, right: float) -> tuple[float, float]:
    width = len(label) * TEXT_WIDTH + 14
    return min(max(x - width / 2, left), max(right - width, left)), width


def label_rows(labels: Sequence[tuple[float, str]], left: float, right: float) -> list[int | None]:
    """A row for each label so that none covers another; None for all when they are too many for `MAX_ROWS`."""
    taken: list[list[tuple[float, float]]] = [[] for _ in range(MAX_ROWS)]
    rows: list[int | None] = []
    for x, label in labels:
        start, width = label_box(x, label, left, right)
        row = next(
            (r for r, boxes in enumerate(taken) if all(start > b + 4 or start + width < a - 4 for a, b in boxes)), None
        )
        if row is None:
            return [None] * len(labels)
        taken[row].append((start, start + width))
        rows.append(row)
    return rows
