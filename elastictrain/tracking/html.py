"""The report as one HTML file that needs nothing else: no scripts, no network, light and dark, readable on a phone.

`report.html` holds the style; this module fills it from the report's dict (pure but for reading that file). Everything
that came from a run is escaped.
"""

from __future__ import annotations

from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from elastictrain.config import flatten
from elastictrain.tracking.chart import loss_chart
from elastictrain.tracking.clock_chart import clock_chart
from elastictrain.tracking.heat_map import heat_map, heat_range
from elastictrain.tracking.memory_chart import MAX_MEASURED, memory_chart
from elastictrain.tracking.scale import MAX_POINTS
from elastictrain.tracking.tables import long_table, table
from elastictrain.tracking.wording import (
    bytes_text,
    count_text,
    energy_text,
    layout_text,
    place_text,
    seconds_text,
    skip_text,
    source_text,
    who_text,
)

Report = dict[str, Any]

LEDGER = {
    "compute": "ranks worked on steps that count",
    "communication": "ranks waited for each other in those steps",
    "data_wait": "waiting for batches",
    "snapshot_stall": "waiting for copies in memory",
    "checkpoint_stall": "waiting for durable checkpoints",
    "lost": "steps that had to be done again",
    "detection": "a fault, not yet noticed",
    "recovery": "noticed, until the next step began",
    "resize": "from one group to the next without a failure",
    "startup": "until the first step of an attempt",
    "evaluation": "held-out text",
    "shutdown": "ending",
    "down": "nobody ran the run",
    "idle": "between steps, and all else",
    "spare": "slots that were held, and no rank worked in",
}
"""Bucket to meaning, in the order of the bar."""


def render_html(report: Report) -> str:
    """The whole file."""
    body = "\n".join(
        [
            _head(report),
            _tiles(report),
            _ending(report),
            _curve(report),
            _ledger(report),
            _clock(report),
            _ranks(report),
            _memory(report),
            _failures(report),
            _skipped_steps(report),
            _generations(report),
            _checkpoints(report),
            _troubles(report),
            _sample(report),
            _details(report),
        ]
    )
    template = files("elastictrain.tracking").joinpath("report.html").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(f"{report['run']}: {report['status']}"), body=body)


def _head(report: Report) -> str:
    status = escape(report["status"])
    started = datetime.fromtimestamp(report["started_at"], UTC).strftime("%Y-%m-%d %H:%M UTC")
    attempts = count_text(len(report["attempts"]), "attempt")
    return (
        f'<header><h1>{escape(report["run"])}</h1><span class="pill {status}">{status}</span>'
        f"<p>Started {started}, {seconds_text(report['wall_s'])} in {attempts}.</p></header>"
    )


def _tiles(report: Report) -> str:
    evaluation, throughput = report["evaluation"], report["throughput"]
    tiles = [(f"{report['steps']:,}", "steps", f"{report['samples']:,} samples")]
    if evaluation and evaluation["bits_per_byte"] is None:
        tiles.append((f"{evaluation['loss']:.4f}", "validation loss", "of what was held out"))
    elif evaluation:
        beside = f"gzip -9: {evaluation['gzip_bits_per_byte']:.3f}"
        tiles.append((f"{evaluation['bits_per_byte']:.3f}", "validation bits per byte", beside))
    elif report["loss"]:
        tiles.append((f"{report['loss'][-1][1]:.4f}", "loss", "of the last step"))
    tiles += [
        (f"{report['lost_steps']:,}", "lost steps", f"done again after {_failure_count(report)}"),
        (seconds_text(report["median_recovery_s"]), "median recovery", "fault to first new step done"),
        (f"{report['goodput']['ratio']:.1%}", "goodput", "of the wall time"),
        (f"{throughput['tokens_per_s']:,.0f}", "tokens/s", f"{throughput['steps_per_s']:.2f} steps/s while it trained"),
    ]
    last = {name: values[-1][1] for name, values in report["gauges"].items()}
    if last.keys() >= {"busiest_expert", "dropped_tokens"}:
        dropped = f"times the mean; {last['dropped_tokens']:.1%} of tokens dropped"
        tiles.append((f"{last['busiest_expert']:.2f}", "busiest expert", dropped))
    return '<section class="tiles">' + "".join(map(_tile, tiles)) + "</section>"


def _tile(tile: tuple[str, str, str]) -> str:
    value, name, note = map(escape, tile)
    return f'<div class="tile"><b>{value}</b><span>{name}</span><small>{note}</small></div>'


def _failure_count(report: Report) -> str:
    deaths = sum(attempt["status"] is None for attempt in report["attempts"][:-1])
    counts = [count_text(len(report["failures"]), "failure")] if report["failures"] or not deaths else []
    return " and ".join([*counts, *([count_text(deaths, "death") + " of the driver"] if deaths else [])])


def _ending(report: Report) -> str:
    """Why the last attempt failed, traceback and all, where everyone looks first."""
    cause = report["attempts"][-1]["cause"]
    if not cause:
        return ""
    trace = f"<pre>{escape(cause['traceback'])}</pre>" if cause["traceback"] else ""
    return f'<section class="card problem"><h2>{escape(cause["message"])}</h2>{trace}</section>'


def _curve(report: Report) -> str:
    if not report["loss"]:
        return _card("Loss", "<p class='quiet'>No step has been committed yet.</p>")
    lines = (
        ("curve-key", "loss of each step"),
        ("failure-key", "failure"),
        ("generation-key", "new generation"),
        ("checkpoint-key", "durable checkpoint"),
    )
    legend = "".join(f'<span><i class="{line}"></i>{name}</span>' for line, name in lines)
    wide, narrow = loss_chart(report, 1040, 430), loss_chart(report, 380, 340)
    return _card(
        "Loss, and what happened on the way",
        _both(wide, narrow)
        + _legend(legend)
        + _thinned(len(report["loss"]), MAX_POINTS, "steps", ", and those beside failures and new generations"),
    )


def _thinned(number: int, limit: int, what: str, also: str = "") -> str:
    """What the line under it leaves out, where it can't have a point for each."""
    if number <= limit:
        return ""
    together = f"{2 * number / limit:,.1f}".removesuffix(".0")
    return (
        f'<p class="quiet">A point stands for several {what}: of every {together}, the lowest and the highest are drawn'
        f"{also}.</p>"
    )


def _ledger(report: Report) -> str:
    ledger, workers = report["goodput"], report["worker_seconds"]
    wall_s = ledger["wall_s"] or 1.0
    used = [(b, ledger[b], meaning) for b, meaning in LEDGER.items() if ledger[b] > 0 or workers[b] > 0]
    bar = "".join(
        f'<div style="flex:{s / wall_s:.6f} 0 0;background:var(--{b})" title="{_bucket(b)}: {seconds_text(s)}"></div>'
        for b, s, _ in used
    )
    rows = [
        (
            f'<span class="bucket"><i style="background:var(--{bucket})"></i>{_bucket(bucket)}</span>',
            f'<span class="meaning">{meaning}</span>',
            seconds_text(seconds),
            f"{seconds / wall_s:.1%}",
            seconds_text(workers[bucket]),
        )
        for bucket, seconds, meaning in used
    ]
    all_workers = seconds_text(workers["total"])
    rows.append(
        ("<b>wall time</b>", "", f"<b>{seconds_text(ledger['wall_s'])}</b>", "<b>100%</b>", f"<b>{all_workers}</b>")
    )
    spent = table(("bucket", "", ">time", ">share", ">all workers"), rows)
    content = f'<div class="bar">{bar}</div>{spent}{_cost(report["cost"])}{_energy(report["energy"])}'
    return _card(f"Where the time went: {ledger['ratio']:.1%} goodput", content)


def _cost(cost: Report | None) -> str:
    """In words; the currency is the reader's."""
    if cost is None:
        return ""
    a_million = cost["per_million_tokens"]
    each = "" if a_million is None else f", {a_million:.4g} for a million tokens"
    price = f"{cost['worker_cost_per_hour']:g} for an hour of a worker"
    return f'<p class="quiet">Cost: {cost["total"]:.4g}{each}, at {price}.</p>'


def _energy(energy: Report | None) -> str:
    return "" if energy is None else f'<p class="quiet">Energy: {energy_text(energy)}.</p>'


def _clock(report: Report) -> str:
    """The same over the wall time; no card before there is any."""
    if not report["wall_s"]:
        return ""
    used = [bucket for bucket in LEDGER if bucket in report["timeline"]["seconds"]]
    legend = "".join(f'<span><i class="patch" style="background:var(--{b})"></i>{_bucket(b)}</span>' for b in used)
    return _card(
        "Over the clock", _both(clock_chart(report, 1040, 420), clock_chart(report, 380, 380)) + _legend(legend)
    )


def _ranks(report: Report) -> str:
    """Who is slow; no card where nobody was timed."""
    if not report["rank_times"]:
        return ""
    fast, slow = map(seconds_text, heat_range(report))
    legend = (
        f'<span><i class="patch cool"></i>{fast}</span><span><i class="patch hot"></i>{slow} of own work a step</span>'
    )
    return _card("How long each rank works", _both(heat_map(report, 1040), heat_map(report, 380)) + _legend(legend))


def _memory(report: Report) -> str:
    """Whether the plan was right; no card where nobody measured."""
    if not report["rank_memory"]:
        return ""
    lines = (("curve-key", "the rank that uses most"), ("planned-key", "what the plan says that a rank needs"))
    legend = '<span><i class="patch used"></i>least to most of the ranks</span>' + "".join(
        f'<span><i class="{line}"></i>{name}</span>' for line, name in lines
    )
    charts = _both(memory_chart(report, 1040, 260), memory_chart(report, 380, 240))
    return _card(
        f"Memory of the ranks: {_fullest(report)}",
        charts + _legend(legend) + _thinned(len(report["rank_memory"]), MAX_MEASURED, "measurements"),
    )


def _fullest(report: Report) -> str:
    most = max(max(m["bytes"]) for m in report["rank_memory"])
    planned = [chosen["memory_bytes"] for chosen in report["layouts"] if chosen["memory_bytes"] is not None]
    return f"at most {bytes_text(most)}" + (f", planned {bytes_text(max(planned))}" if planned else "")


def _both(wide: str, narrow: str) -> str:
    """One picture for a screen, one for a phone."""
    return f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'


def _legend(content: str) -> str:
    return f'<p class="legend">{content}</p>'


def _bucket(name: str) -> str:
    return name.replace("_", " ")


def _failures(report: Report) -> str:
    if not report["failures"]:
        return _card("Failures", '<p class="quiet">None.</p>')
    rows = []
    for failure in report["failures"]:
        cause = failure["cause"]
        what = f"<b>{escape(cause['message'])}</b>" + (
            ' <span class="quiet">injected</span>' if failure["injected"] else ""
        )
        what += f'<br><span class="quiet">{escape(failure["kind"].replace("_", " "))}</span>'
        if cause["traceback"]:
            what += f"<details><summary>traceback</summary><pre>{escape(cause['traceback'])}</pre></details>"
        place = escape(place_text(failure["pid"], failure["node"]))
        where = f"{who_text(failure)}<br><span class='quiet'>{place}</span>"
        rows.append(
            (
                seconds_text(failure["at_s"]),
                f"{failure['step']:,}",
                what,
                where,
                seconds_text(failure["detected_s"]),
                seconds_text(failure["recovered_s"]),
                "–" if failure["lost_steps"] is None else str(failure["lost_steps"]),
                escape(f"{failure['continuation']} from {source_text(failure['source'])}")
                if failure["source"]
                else "not recovered",
            )
        )
    head = (">at", ">step", "cause", "where", ">detected", ">recovered", ">lost steps", "continued")
    return _card("Failures", long_table(head, rows))


def _skipped_steps(report: Report) -> str:
    """Steps that did not count; no card where there are none."""
    rows = []
    for skip in report["skipped_steps"]:
        alone = skip["first_step"] == skip["step"]
        last_sample = skip["first_sample"] + skip["num_samples"] - 1
        rows.append(
            (
                seconds_text(skip["at_s"]),
                f"{skip['step']:,}",
                escape(skip_text(skip["reason"], skip["loss"], skip["limit"])),
                f"{skip['first_sample']:,} to {last_sample:,}",
                "weights as they were" if alone else f"back to the state after step {skip['first_step'] - 1:,}",
            )
        )
    return _card("Skipped steps", long_table((">at", ">step", "why", "samples", "then"), rows)) if rows else ""


def _generations(report: Report) -> str:
    why = {chosen["generation"]: chosen["why"] for chosen in report["layouts"]}
    rows = [
        (
            str(g["index"]),
            str(g["attempt"]),
            seconds_text(g["at_s"]),
            f"{g['first_step']:,}",
            escape(layout_text(g)) + _quiet(why.get(g["index"], "")),
            escape(g["cause"]),
            escape(f"{g['source']}, {g['continuation']}"),
            escape(", ".join(f"{name} {seconds_text(s)}" for name, s in g["phases_s"].items())),
        )
        for g in report["generations"]
    ]
    head = ("#", "attempt", ">at", ">from step", "layout", "cause", "state from", "phases")
    return _card("Generations", long_table(head, rows))


def _quiet(words: str) -> str:
    return f'<br><span class="quiet">{escape(words)}</span>' if words else ""


def _checkpoints(report: Report) -> str:
    rows = [
        (
            f"{c['step']:,}",
            f"<code>{escape(c['uri'])}</code>" + (' <span class="quiet">removed</span>' if c["removed"] else ""),
            bytes_text(c["bytes"]),
            f'<code title="{escape(c["sha256"])}">{escape(c["sha256"][:12])}</code>',
            seconds_text(c["seconds"]),
            seconds_text(c["stall_s"]),
        )
        for c in report["checkpoints"]
    ]
    if not rows:
        return _card("Durable checkpoints", '<p class="quiet">None yet.</p>')
    return _card("Durable checkpoints", long_table((">step", "uri", ">size", "sha256", ">written in", ">stall"), rows))


def _troubles(report: Report) -> str:
    """Warnings and rejected checkpoints; no card where there are none."""
    rows = [(seconds_text(w["at_s"]), escape(w["topic"]), escape(w["message"])) for w in report["warnings"]]
    for rejected in report["rejected_checkpoints"]:
        text = f"{escape(rejected['problem'])}<br><code>{escape(rejected['uri'])}</code>"
        rows.append((seconds_text(rejected["at_s"]), "checkpoint not loaded", text))
    return _card("Warnings", long_table((">at", "about", "what"), rows)) if rows else ""


def _sample(report: Report) -> str:
    evaluation = report["evaluation"]
    if not evaluation or not evaluation["sample"]:
        return ""
    return _card("Text that the model wrote", f"<pre>{escape(evaluation['sample'])}</pre>")


def _details(report: Report) -> str:
    config = [(f"<code>{escape(k)}</code>", f"<code>{escape(str(v))}</code>") for k, v in flatten(report["config"])]
    environment = [(escape(k), f"<code>{escape(v)}</code>") for k, v in report["environment"].items()]
    digest = escape(report["sample_digest"])
    return (
        f'<details class="card"><summary>Config</summary>{table(("field", "value"), config)}</details>'
        f'<details class="card"><summary>Environment</summary>{table(("", ""), environment)}</details>'
        f"<footer>Digest of all samples in the order of their steps: <code>{digest}</code></footer>"
    )


def _card(title: str, content: str) -> str:
    return f'<section class="card"><h2>{escape(title)}</h2>{content}</section>'
