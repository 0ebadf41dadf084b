"""The run over its wall time as SVG (pure): where each moment went, how fast it trained, with how many workers.

Three strips over one axis of time, from the report's `timeline` and `generations`; at most some
150 KB whatever the run's length. Colours come from CSS classes, as in `chart`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from elastictrain.tracking.scale import gather, ticks
from elastictrain.tracking.wording import count_text, seconds_text

STACK = (
    "compute",
    "communication",
    "data_wait",
    "snapshot_stall",
    "checkpoint_stall",
    "lost",
    "detection",
    "recovery",
    "resize",
    "startup",
    "evaluation",
    "shutdown",
    "idle",
    "down",
    "spare",
)
"""Buckets from the bottom up: what counts first, so that the edge of it is the goodput."""

_UNITS = (("h", 3600.0), ("min", 60.0), ("s", 1.0))


@dataclass(frozen=True, slots=True)
class Strip:
    """A part of the picture with its own scale, from `low` at the bottom to `high` at the top."""

    name: str
    top: float
    bottom: float
    high: float

    def y(self, value: float) -> float:
        """Of a value."""
        return self.bottom - value / (self.high or 1.0) * (self.bottom - self.top)


@dataclass(frozen=True, slots=True)
class TimeAxis:
    """From 0 to `wall_s`."""

    left: float
    right: float
    wall_s: float

    def x(self, at_s: float) -> float:
        """Of a time since the run's start."""
        share = min(max(at_s / self.wall_s, 0.0), 1.0) if self.wall_s > 0 else 0.0
        return self.left + share * (self.right - self.left)

    def draw(self, y: float, count: int) -> str:
        """The words under it."""
        unit, unit_s = next((u for u in _UNITS if self.wall_s >= 3 * u[1]), _UNITS[-1])
        parts = []
        for value in ticks(0.0, self.wall_s / unit_s, count):
            x = self.x(value * unit_s)
            anchor = "start" if x < self.left + 10 else "end" if x > self.right - 16 else "middle"
            parts.append(f'<text class="axis" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{value:g} {unit}</text>')
        return "".join(parts)


def clock_chart(report: dict[str, Any], width: int, height: int) -> str:
    """The picture for a page that styles it."""
    axis = TimeAxis(48.0, width - 18.0, report["wall_s"])
    unit = (height - 30.0 - 3 * 22.0) / 6
    rates = _rates(report)
    most = max((g["world_size"] for g in report["generations"]), default=1)
    stack = Strip("share of the time", 18.0, 18.0 + 3 * unit, 1.0)
    speed = Strip("tokens/s", stack.bottom + 22.0, stack.bottom + 22.0 + 2 * unit, max(rates, default=0.0) * 1.05)
    size = Strip("workers", speed.bottom + 22.0, speed.bottom + 22.0 + unit, most)
    label = f"{report['run']} over {seconds_text(report['wall_s'])}: where the time went, tokens a second, workers"
    body = [
        *grid(stack, axis, [(0.0, "0 %"), (0.5, "50 %"), (1.0, "100 %")]),
        *grid(speed, axis, [(v, f"{v:,.0f}") for v in ticks(0.0, speed.high, 3)]),
        *grid(size, axis, [(0.0, "0"), (float(most), str(most))]),
        *_stack(report, stack, axis),
        _speed(rates, speed, axis),
        *_sizes(report, size, axis),
        *_failures(report, stack.top, size.bottom, axis),
        axis.draw(size.bottom + 18.0, 4 if width < 600 else 8),
    ]
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(body)}</svg>"
    )


def grid(strip: Strip, axis: TimeAxis, marks: list[tuple[float, str]]) -> Iterator[str]:
    """The strip's name, and a line at each value with its text."""
    yield f'<text class="axis" x="{axis.left:.1f}" y="{strip.top - 5:.1f}">{strip.name}</text>'
    for value, text in marks:
        y = strip.y(value)
        yield f'<line class="grid" x1="{axis.left}" x2="{axis.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="axis" x="{axis.left - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'


def _stack(report: dict[str, Any], strip: Strip, axis: TimeAxis) -> Iterator[str]:
    """One area a bucket, each on top of those before."""
    told = report["timeline"]
    num_parts = len(told["tokens"])
    below = [0.0] * num_parts
    for bucket in (b for b in STACK if b in told["seconds"]):
        above = [low + s / (told["part_s"] or 1.0) for low, s in zip(below, told["seconds"][bucket])]
        there = [*_edge(above, strip, axis, told["part_s"])]
        back = [*_edge(below, strip, axis, told["part_s"])][::-1]
        name, seconds = bucket.replace("_", " "), report["goodput"][bucket]
        yield (
            f'<path style="fill:var(--{bucket})" d="M{" ".join([*there, *back])}z">'
            f"<title>{name}: {seconds_text(seconds)}</title></path>"
        )
        below = above


def _edge(values: list[float], strip: Strip, axis: TimeAxis, part_s: float) -> Iterator[str]:
    """Steps, not slopes: a part of the time has one value. Corners that change nothing are left out."""
    for part, value in enumerate(values):
        y = strip.y(min(value, strip.high))
        if part and value == values[part - 1]:
            continue
        if part:
            yield f"{axis.x(part * part_s):.1f},{strip.y(min(values[part - 1], strip.high)):.1f}"
        yield f"{axis.x(part * part_s):.1f},{y:.1f}"
    yield f"{axis.x(len(values) * part_s):.1f},{strip.y(min(values[-1], strip.high)):.1f}"


def _rates(report: dict[str, Any]) -> list[float]:
    told = report["timeline"]
    return [tokens / told["part_s"] for tokens in told["tokens"]] if told["part_s"] else []


def _speed(rates: list[float], strip: Strip, axis: TimeAxis) -> str:
    if not rates:
        return ""
    points = " ".join(_edge(rates, strip, axis, axis.wall_s / len(rates)))
    return f'<polyline class="curve" points="{points}"><title>tokens a second, of steps that count</title></polyline>'


def _sizes(report: dict[str, Any], strip: Strip, axis: TimeAxis) -> Iterator[str]:
    generations = sorted(report["generations"], key=lambda g: g["at_s"])
    seen = {attempt["attempt"]: attempt["seen_s"] for attempt in report["attempts"]}
    nexts = [*(g["at_s"] for g in generations[1:]), report["wall_s"]]
    ends = [min(next_s, seen[g["attempt"]]) for g, next_s in zip(generations, nexts)]
    for together in gather([*zip(generations, ends)], lambda found: axis.x(found[0]["at_s"])):
        generation, (_, end_s) = together[0][0], together[-1]
        left, right = axis.x(generation["at_s"]), axis.x(end_s)
        title = f"generation {generation['index']}: {count_text(generation['world_size'], 'worker')}"
        title += f": {generation['cause']}" + (f", and {len(together) - 1} more" if together[1:] else "")
        for size in sorted({pick(g["world_size"] for g, _ in together) for pick in (min, max)}):
            top = strip.y(size)
            yield (
                f'<rect class="world" x="{left:.1f}" y="{top:.1f}" width="{max(right - left, 0.5):.1f}" '
                f'height="{strip.bottom - top:.1f}"><title>{escape(title)}</title></rect>'
            )


def _failures(report: dict[str, Any], top: float, bottom: float, axis: TimeAxis) -> Iterator[str]:
    for failure, *more in gather(report["failures"], lambda f: axis.x(f["at_s"])):
        x = axis.x(failure["at_s"])
        title = f"{seconds_text(failure['at_s'])}: {failure['kind']}, {failure['cause']['message']}"
        title += f"; and {len(more)} more" if more else ""
        yield (
            f'<g class="failure"><title>{escape(title)}</title>'
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/></g>'
        )
