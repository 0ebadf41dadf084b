"""The memory that ranks use over the run's time, beside what the plan said that they need, as SVG (pure).

From the report's `rank_memory` and `layouts`: a band from the rank with the least to the one with the most, the most as
a line, the plan as a dashed line that changes with the layout. At most 2,000 points whatever the run's length, but for
a few of each attempt.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterator
from html import escape
from itertools import groupby
from typing import Any

from elastictrain.tracking.clock_chart import Strip, TimeAxis, grid
from elastictrain.tracking.scale import downsample, ticks
from elastictrain.tracking.wording import bytes_text

MAX_MEASURED = 1000
"""Of each edge of the band."""


def memory_chart(report: dict[str, Any], width: int, height: int) -> str:
    """The picture for a page that styles it; "" where there is nothing to show."""
    measured = report["rank_memory"]
    if not measured:
        return ""
    attempts = [*_by_attempt(report)]
    limit = max(MAX_MEASURED // len(attempts), 8)
    axis = TimeAxis(64.0, width - 18.0, report["wall_s"])
    planned = [*_planned(report)]
    most = max([*(max(m["bytes"]) for m in measured), *(num_bytes for _, _, num_bytes in planned)])
    strip = Strip("memory of a rank", 18.0, height - 30.0, most * 1.08)
    label = f"Memory of a rank, at most {bytes_text(max(max(m['bytes']) for m in measured))}"
    body = [
        *grid(strip, axis, [(v, bytes_text(v) if v else "0") for v in ticks(0.0, strip.high, 4)]),
        *(part for attempt in attempts for part in _used(attempt, strip, axis, limit)),
        *_plan(planned, strip, axis),
        axis.draw(strip.bottom + 18.0, 4 if width < 600 else 8),
    ]
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(body)}</svg>"
    )


def _planned(report: dict[str, Any]) -> Iterator[tuple[float, float, int]]:
    """From when, until when, and how much; where the plan could tell."""
    layouts = sorted(report["layouts"], key=lambda chosen: chosen["at_s"])
    ends = [*(chosen["at_s"] for chosen in layouts[1:]), report["wall_s"]]
    for chosen, end_s in zip(layouts, ends, strict=True):
        if chosen["memory_bytes"] is not None:
            yield chosen["at_s"], end_s, chosen["memory_bytes"]


def _by_attempt(report: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Between two attempts nobody used any."""
    starts = [attempt["started_s"] for attempt in report["attempts"]]
    yield from (list(group) for _, group in groupby(report["rank_memory"], lambda m: bisect(starts, m["at_s"])))


def _used(measured: list[dict[str, Any]], strip: Strip, axis: TimeAxis, limit: int) -> Iterator[str]:
    def edge(pick: Callable[[list[int]], int]) -> list[str]:
        points = downsample([(m["at_s"], float(pick(m["bytes"]))) for m in measured], limit)
        return [f"{axis.x(at_s):.1f},{strip.y(value):.1f}" for at_s, value in points]

    least, most = edge(min), edge(max)
    last = measured[-1]
    ranks = ", ".join(f"rank {rank} {bytes_text(b)}" for rank, b in enumerate(last["bytes"][:16]))
    words = f"after step {last['step']:,}: {ranks}"
    title = f"<title>{escape(words)}</title>"
    if len(measured) == 1:
        x, y = most[0].split(",")
        yield f'<circle class="used" cx="{x}" cy="{y}" r="3.5">{title}</circle>'
        return
    yield f'<path class="used" d="M{" ".join([*most, *reversed(least)])}z">{title}</path>'
    yield f'<polyline class="curve" points="{" ".join(most)}">{title}</polyline>'


def _plan(planned: list[tuple[float, float, int]], strip: Strip, axis: TimeAxis) -> Iterator[str]:
    for begin_s, end_s, num_bytes in planned:
        y = strip.y(num_bytes)
        yield (
            f'<line class="planned" x1="{axis.x(begin_s):.1f}" x2="{axis.x(end_s):.1f}" y1="{y:.1f}" y2="{y:.1f}">'
            f"<title>the plan: {bytes_text(num_bytes)}</title></line>"
        )
