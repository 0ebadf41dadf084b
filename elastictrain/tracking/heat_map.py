"""How long each rank works in a step, over the run's time, as a heat map in SVG (pure).

A column is a window of the report's `rank_times`, a row a rank; the colour goes from the run's fast ranks to its slow
ones, ends left out, so that one odd window does not wash out the rest. Many ranks share a row by their slowest, many
windows a column by their mean: at most 48 rows and 120 columns, and some 400 KB at worst.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from html import escape
from statistics import fmean, quantiles
from typing import Any

from elastictrain.tracking.clock_chart import TimeAxis
from elastictrain.tracking.wording import seconds_text

MAX_ROWS = 48
MAX_COLUMNS = 120
ROW_HEIGHTS = (6.0, 26.0)
"""Of many rows, and of few."""

Windows = Sequence[dict[str, Any]]


def heat_map(report: dict[str, Any], width: int) -> str:
    """The picture for a page that styles it; "" where there is nothing to show."""
    windows: Windows = report["rank_times"]
    if not windows:
        return ""
    num_ranks = max(len(w["own_s"]) for w in windows)
    per_row = -(-num_ranks // MAX_ROWS)
    num_rows = -(-num_ranks // per_row)
    row_height = min(max(280.0 / num_rows, ROW_HEIGHTS[0]), ROW_HEIGHTS[1])
    axis = TimeAxis(48.0, width - 18.0, report["wall_s"])
    low, high = _range([s for w in windows for s in w["own_s"]])
    height = 8 + num_rows * row_height + 24
    cells = [
        _cell(axis, row, row_height, per_row, column, (low, high))
        for column in _columns(windows, report["wall_s"])
        for row in range(num_rows)
    ]
    label = f"Seconds of own work in a step, by rank, from {seconds_text(low)} to {seconds_text(high)}"
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"{''.join(_ranks(axis, num_rows, row_height, per_row))}{''.join(cells)}"
        f"{axis.draw(8 + num_rows * row_height + 18, 4 if width < 600 else 8)}</svg>"
    )


def heat_range(report: dict[str, Any]) -> tuple[float, float]:
    """Seconds at the two ends of the colours."""
    return _range([s for w in report["rank_times"] for s in w["own_s"]])


def _range(seconds: Sequence[float]) -> tuple[float, float]:
    if len(seconds) < 2:
        return min(seconds, default=0.0), max(seconds, default=0.0)
    hundredths = quantiles(seconds, n=100, method="inclusive")
    return hundredths[1], hundredths[97]


def _columns(windows: Windows, wall_s: float) -> Iterator[Windows]:
    """Windows of one generation that are next to each other, so few that they can be told apart."""
    columns: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for window in windows:
        place = int(MAX_COLUMNS * window["at_s"] / wall_s) if wall_s > 0 else 0
        columns[window["generation"], place].append(window)
    yield from columns.values()


def _cell(
    axis: TimeAxis, row: int, row_height: float, per_row: int, column: Windows, ends_s: tuple[float, float]
) -> str:
    ranks = range(row * per_row, min((row + 1) * per_row, len(column[0]["own_s"])))
    if not ranks:
        return ""
    slowest = max(ranks, key=lambda rank: fmean(w["own_s"][rank] for w in column))
    seconds = fmean(w["own_s"][slowest] for w in column)
    low, high = ends_s
    heat = min(max((seconds - low) / (high - low), 0.0), 1.0) if high > low else 0.0
    left, right = axis.x(column[0]["begun_s"]), axis.x(column[-1]["at_s"])
    title = (
        f"rank {slowest}, steps {column[0]['first_step']} to {column[-1]['last_step']}: {seconds_text(seconds)} a step"
    )
    return (
        f'<rect x="{left:.1f}" y="{8 + row * row_height:.1f}" width="{max(right - left, 1.0):.1f}" '
        f'height="{row_height - 1:.1f}" style="fill:color-mix(in oklab,var(--hot) {heat:.0%},var(--cool))">'
        f"<title>{escape(title)}</title></rect>"
    )


def _ranks(axis: TimeAxis, num_rows: int, row_height: float, per_row: int) -> Iterator[str]:
    every = -(-14 // int(row_height))
    for row in range(0, num_rows, every):
        y = 8 + row * row_height + row_height / 2 + 4
        name = str(row * per_row) if row else "rank 0"
        yield f'<text class="axis" x="{axis.left - 8}" y="{y:.1f}" text-anchor="end">{name}</text>'
