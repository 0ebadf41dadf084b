"""The picture of a sweep as SVG (pure): the metric of each trial over its steps, the best one on top.

A file of its own, with its colours: light, or dark where the reader's system is. The pointer over a line names the
trial and its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from elastictrain.tracking.scale import ticks
from elastictrain.tracking.wording import count_text

WIDTH, HEIGHT = 960, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, WIDTH - 24.0, 64.0, HEIGHT - 48.0
_HIGH = 0.97
"""The share of the points that the scale is for: a trial that went astray leaves at the top, or it would hide all."""
_STYLE = """
svg{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;--paper:#fff;--ink:#101828;--dim:#667085;--grid:#e6e8ee;
--line:#98a2b3;--best:#3b5bdb;--bad:#e03131}
@media (prefers-color-scheme:dark){svg{--paper:#12151c;--ink:#f2f4f7;--dim:#98a2b3;--grid:#262b36;--line:#5d6778;
--best:#91a7ff;--bad:#ff8787}}
.paper{fill:var(--paper)}.heading{font-size:15px;font-weight:650;fill:var(--ink)}.axis{fill:var(--dim)}
.grid{stroke:var(--grid)}polyline{fill:none;stroke:var(--line);stroke-width:1.5;stroke-linejoin:round}
circle{fill:var(--line)}.best polyline{stroke:var(--best);stroke-width:2.5}.best circle,.best text{fill:var(--best)}
.failed polyline{stroke:var(--bad)}.failed circle{fill:var(--bad)}.best text{font-weight:600}
g:hover polyline{stroke-width:4}
"""


def sweep_chart(sweep: dict[str, Any]) -> str:
    """The file. `sweep` has `sweep`, `metric` and `trials`, best first: name, values, state and points."""
    trials = [trial for trial in sweep["trials"] if trial["points"]]
    values = sorted(value for trial in trials for _, value in trial["points"]) or [0.0, 1.0]
    low, high = _range(values)
    last = max((step for trial in trials for step, _ in trial["points"]), default=1)
    heading = f"{sweep['sweep']}: {sweep['metric']} of {count_text(len(trials), 'trial')}"
    drawn = [_trial(trial, best=trial is trials[0], low=low, high=high, last=last) for trial in reversed(trials)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(heading)}"><style>{_STYLE}</style>'
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/><text class="heading" x="16" y="28">{escape(heading)}'
        f"</text>{_axes(low, high, last)}{''.join(drawn)}</svg>\n"
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = values[0], values[int((len(values) - 1) * _HIGH)]
    margin = (high - low) * 0.06 or max(abs(high) * 0.05, 0.5)
    return low - margin, high + margin


def _x(step: float, last: int) -> float:
    return _LEFT + (_RIGHT - _LEFT) * step / last


def _y(value: float, low: float, high: float) -> float:
    share = (min(max(value, low), high) - low) / (high - low)
    return _BOTTOM - share * (_BOTTOM - _TOP)


def _axes(low: float, high: float, last: int) -> str:
    parts = []
    for value in ticks(low, high, 6):
        y = _y(value, low, high)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="axis" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for step in (t for t in ticks(0, last, 8) if t == int(t)):
        text = "step 0" if step == 0 else f"{step:,.0f}"
        parts.append(
            f'<text class="axis" x="{_x(step, last):.1f}" y="{_BOTTOM + 22}" text-anchor="middle">{text}</text>'
        )
    return "".join(parts)


def _trial(trial: dict[str, Any], *, best: bool, low: float, high: float, last: int) -> str:
    """A line; broken where PBT took the trial back to an earlier step."""
    legs: list[list[tuple[float, float]]] = [[]]
    before = 0
    for step, value in trial["points"]:
        if step <= before:
            legs.append([])
        legs[-1].append((_x(step, last), _y(value, low, high)))
        before = step
    lines = "".join(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in leg)}"/>' for leg in legs)
    x, y = legs[-1][-1]
    values = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in trial["values"].items()
    )
    title = f"{trial['name']}: {values}; {trial['state']} at step {before}, {trial['points'][-1][1]:.4g}"
    label = f'<text x="{x - 6:.1f}" y="{y + 18:.1f}" text-anchor="end">{escape(trial["name"])}</text>' if best else ""
    kind = " ".join([trial["state"], *(["best"] if best else [])])
    return (
        f'<g class="{kind}"><title>{escape(title)}</title>{lines}<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>{label}</g>'
    )
