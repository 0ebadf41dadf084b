"""The picture of a run as SVG (pure): the loss over the steps, what happened on it, and the world size under it.

Colours come from CSS classes, so that the page around it decides between light and dark; `standalone_svg` brings its
own light ones and is a picture for a README. A curve of more than 2,000 points keeps each bucket's lowest and
highest, and those beside failures and new generations: no spike is lost. Of more than 400 events of a kind, those that
lie together are one mark. So a picture stays below 500 KB whatever the run's length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import Any

from elastictrain.tracking.scale import (
    ROW_HEIGHT,
    STRIP_HEIGHT,
    TEXT_WIDTH,
    Frame,
    downsample,
    gather,
    label_box,
    label_rows,
    ticks,
)
from elastictrain.tracking.wording import bytes_text, count_text, layout_text

HOVER_BANDS = 160

STANDALONE_STYLE = """
svg{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;background:#fff}
.grid{stroke:#e6e8ee}.axis,.note{fill:#667085}.curve{fill:none;stroke:#3b5bdb;stroke-width:1.75;stroke-linejoin:round;
stroke-linecap:round}
.world{fill:#3b5bdb;fill-opacity:.14;stroke:#3b5bdb;stroke-width:1.25}.world-text{fill:#344054}
.failure line{stroke:#e03131;stroke-width:1.5}.failure rect{fill:#e03131}.failure text{fill:#fff;font-weight:600}
.failure circle{fill:#e03131}.generation{stroke:#98a2b3;stroke-dasharray:3 3}.checkpoint{fill:#2b8a3e}
.band{fill:transparent}.heading{font-size:15px;font-weight:650;fill:#101828}
"""


def standalone_svg(report: dict[str, Any], width: int = 960, height: int = 440) -> str:
    """The picture as a file of its own, on white."""
    ratio = report["goodput"]["ratio"]
    heading = (
        f"{report['run']}: {report['steps']} steps, {count_text(len(report['failures']), 'failure')}, "
        f"{count_text(report['lost_steps'], 'step')} done again, goodput {ratio:.0%}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + 34}" width="{width}" '
        f'height="{height + 34}" role="img" aria-label="{escape(heading)}"><style>{STANDALONE_STYLE}</style>'
        f'<rect width="{width}" height="{height + 34}" fill="#fff"/>'
        f'<text x="16" y="25" class="heading">{escape(heading)}</text>'
        f'<g transform="translate(0 34)">{_drawing(report, width, height)}</g></svg>\n'
    )


def loss_chart(report: dict[str, Any], width: int, height: int) -> str:
    """The picture for a page that styles it."""
    label = f"Loss of {report['run']} over {report['steps']} steps, and what happened on the way"
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f"{_drawing(report, width, height)}</svg>"
    )


def _drawing(report: dict[str, Any], width: int, height: int) -> str:
    trial = Frame(report, width, height, 0)
    failures = gather(report["failures"], lambda f: trial.x(f["step"]))
    labels = [_failure_label(together[0], short=width < 600) for together in failures]
    rows = label_rows([(trial.x(f[0]["step"]), t) for f, t in zip(failures, labels)], trial.left, trial.right)
    frame = Frame(report, width, height, max((r + 1 for r in rows if r is not None), default=0))
    return "".join(
        [
            _axes(frame, narrow=width < 600),
            _world(report, frame),
            _generations(report, frame),
            _curve(report, frame),
            _checkpoints(report, frame),
            _bands(report["loss"], frame),
            *(_failure(f, t, r, frame) for f, t, r in zip(failures, labels, rows)),
        ]
    )


def _axes(frame: Frame, narrow: bool) -> str:
    parts = [f'<text class="axis" x="{frame.left - 40:.1f}" y="{frame.top - 4:.1f}">loss</text>']
    for value in ticks(frame.low, frame.high, 6):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if y > frame.top + 8:
            parts.append(f'<text class="axis" x="{frame.left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    steps = [1.0, *(t for t in ticks(1, frame.last_step, 4 if narrow else 8) if t > 1 and t == int(t))]
    y = frame.strip_bottom + 18
    for step in steps:
        x = frame.x(step)
        if step == 1 or x - frame.left > 30:
            text = f"step {step:,.0f}" if step == 1 else f"{step:,.0f}"
            anchor = "start" if step == 1 else "end" if x > frame.right - 20 else "middle"
            parts.append(f'<text class="axis" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>')
    return "".join(parts)


def _curve(report: dict[str, Any], frame: Frame) -> str:
    """The line, broken where the loss is no number."""
    parts = []
    points = downsample([(step, value) for step, value in report["loss"]], beside=_beside_events(report))
    for finite, run in groupby(points, key=lambda point: math.isfinite(point[1])):
        if finite:
            path = [f"{frame.x(step):.1f},{frame.y(value):.1f}" for step, value in run]
            parts.append(f'<polyline class="curve" points="{" ".join(path if path[1:] else path * 2)}"/>')
    return "".join(parts)


def _beside_events(report: dict[str, Any]) -> set[int]:
    """Steps whose losses are always drawn: at failures and new generations, one before and one after; 1,200 at most."""
    changed = sorted({f["step"] for f in report["failures"]} | {g["first_step"] for g in report["generations"]})
    some = (together[0] for together in gather(changed, float))
    return {step for at in some for step in (at - 1, at, at + 1)}


def _world(report: dict[str, Any], frame: Frame) -> str:
    """The strip of world sizes: each generation over the steps of it that stand."""
    generations = report["generations"]
    most = max((g["world_size"] for g in generations), default=1)
    parts = []
    ends = [report["steps"] + 1] * len(generations)
    for i in range(len(generations) - 2, -1, -1):
        ends[i] = min(ends[i + 1], generations[i + 1]["first_step"])
    standing = [(g, end) for g, end in zip(generations, ends) if end > g["first_step"]]
    for together in gather(standing, lambda found: frame.x(found[0]["first_step"])):
        generation, (_, end) = together[0][0], together[-1]
        left, right = frame.x(generation["first_step"]), frame.x(end)
        title = f"generation {generation['index']}: {layout_text(generation)}, from step {generation['first_step']}"
        title += f", and {len(together) - 1} more until step {end - 1}" if together[1:] else ""
        for size in sorted({pick(g["world_size"] for g, _ in together) for pick in (min, max)}):
            height = STRIP_HEIGHT * size / most
            parts.append(
                f'<rect class="world" x="{left:.1f}" y="{frame.strip_bottom - height:.1f}" width="{right - left:.1f}" '
                f'height="{height:.1f}"><title>{escape(title)}</title></rect>'
            )
        text = next((t for t in (count_text(size, "worker"), str(size)) if len(t) * TEXT_WIDTH + 10 < right - left), "")
        if text:
            parts.append(
                f'<text class="world-text" x="{left + 6:.1f}" y="{frame.strip_bottom - 6:.1f}">{escape(text)}</text>'
            )
    return "".join(parts)


def _generations(report: dict[str, Any], frame: Frame) -> str:
    parts = []
    for generation, *more in gather(report["generations"][1:], lambda g: frame.x(g["first_step"])):
        x = frame.x(generation["first_step"])
        title = f"generation {generation['index']} from step {generation['first_step']}: {generation['cause']}"
        title += f", and {len(more)} more until step {more[-1]['first_step']}" if more else ""
        parts.append(
            f'<line class="generation" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top:.1f}" y2="{frame.bottom:.1f}">'
            f"<title>{escape(title)}</title></line>"
        )
    return "".join(parts)


def _checkpoints(report: dict[str, Any], frame: Frame) -> str:
    parts = []
    for checkpoint, *more in gather(report["checkpoints"], lambda c: frame.x(c["step"])):
        x, y = frame.x(checkpoint["step"]), frame.bottom
        removed = ", removed since" if checkpoint["removed"] else ""
        title = f"checkpoint after step {checkpoint['step']}: {bytes_text(checkpoint['bytes'])}{removed}"
        title += f", and {len(more)} more until step {more[-1]['step']}" if more else ""
        parts.append(
            f'<path class="checkpoint" d="M{x:.1f} {y - 6:.1f}l5 6l-5 6l-5 -6z"><title>{escape(title)}</title></path>'
        )
    return "".join(parts)


def _bands(loss: Sequence[Sequence[float]], frame: Frame) -> str:
    """Invisible bands over the curve that say the losses under the pointer."""
    parts = []
    size = max(math.ceil(len(loss) / HOVER_BANDS), 1)
    for i in range(0, len(loss), size):
        band = loss[i : i + size]
        left, right = frame.x(band[0][0] - 0.5), frame.x(band[-1][0] + 0.5)
        finite = [v for _, v in band if math.isfinite(v)] or [math.nan]
        text = (
            f"step {band[0][0]}: loss {band[0][1]:.4f}"
            if len(band) == 1
            else f"steps {band[0][0]} to {band[-1][0]}: loss {min(finite):.4f} to {max(finite):.4f}"
        )
        parts.append(
            f'<rect class="band" x="{left:.1f}" y="{frame.top:.1f}" width="{right - left:.1f}" '
            f'height="{frame.bottom - frame.top - 7:.1f}"><title>{text}</title></rect>'
        )
    return "".join(parts)


def _failure(together: Sequence[dict[str, Any]], label: str, row: int | None, frame: Frame) -> str:
    failure, *more = together
    x = frame.x(failure["step"])
    top = frame.top if row is None else row * ROW_HEIGHT + 8.0
    title = f"step {failure['step']}: {failure['kind']}, {failure['cause']['message']}, {_outcome(failure)}"
    title += f"; and {len(more)} more until step {more[-1]['step']}" if more else ""
    parts = [f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{frame.strip_bottom:.1f}"/>']
    if row is None:
        parts.append(f'<circle cx="{x:.1f}" cy="{top:.1f}" r="3.5"/>')
    else:
        left, width = label_box(x, label, frame.left, frame.right)
        parts.append(
            f'<rect x="{left:.1f}" y="{top - 6:.1f}" width="{width:.1f}" height="17" rx="4"/>'
            f'<text x="{left + width / 2:.1f}" y="{top + 6.5:.1f}" text-anchor="middle">{escape(label)}</text>'
        )
    return f'<g class="failure"><title>{escape(title)}</title>{"".join(parts)}</g>'


def _failure_label(failure: dict[str, Any], short: bool) -> str:
    what: str = failure["cause"]["message"].split(":")[0]
    what = what if len(what) <= 22 else what[:21] + "…"
    if short or failure["recovered_s"] is None:
        return what
    return f"{what}, back in {failure['recovered_s']:.2f} s"


def _outcome(failure: dict[str, Any]) -> str:
    if failure["recovered_s"] is None:
        return "not recovered"
    lost = count_text(failure["lost_steps"], "step")
    return f"first new step after {failure['recovered_s']:.2f} s, {lost} lost, {failure['continuation']}"
