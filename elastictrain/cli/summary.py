"""A run in a screen of words, from its report: what `train` prints at the end and `report` by default."""

from __future__ import annotations

import math
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from elastictrain.sentences import percent
from elastictrain.tracking.redact import redact
from elastictrain.tracking.wording import count_text, energy_text, seconds_text, source_text, who_text

if TYPE_CHECKING:
    from elastictrain.trainer import Result

Report = dict[str, Any]

SAMPLE_HEADING = "------------ the model writes ------------"


def summary(result: Result) -> str:
    """The report in words, and where to find more."""
    places = [("report", str(result.report))]
    if result.checkpoint:
        places.append(("checkpoint", result.checkpoint))
    if result.recorded:
        places.append(("MLflow", _where_to_look(result.mlflow_uri)))
    else:
        missing = f"not everything is there: {redact(result.mlflow_uri)}; the same command delivers the rest"
        places.append(("MLflow", missing))
    warnings = [w for w in result.report_data["warnings"] if w["topic"] != "tracking"]  # the line above says it
    return f"{summarise(result.report_data | {'warnings': warnings})}\n\n{_columns(places)}"


def _where_to_look(mlflow_uri: str) -> str:
    """A server's address, which a browser opens; for a store the command that shows it, to be pasted as it stands."""
    if mlflow_uri.startswith(("http://", "https://")):
        return redact(mlflow_uri)
    return shlex.join([sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", mlflow_uri])


def summarise(report: Report) -> str:
    """The report in words."""
    return "\n\n".join(filter(None, [_columns(_figures(report)), _failures(report), _sample(report)]))


def ended_at(report: Report) -> float:
    """Unix time at which the last attempt ended; infinity while it has not."""
    ended_s = report["attempts"][-1]["ended_s"]
    return math.inf if ended_s is None else float(report["started_at"] + ended_s)


def _figures(report: Report) -> Iterator[tuple[str, str]]:
    steps, goal = report["steps"], report["config"]["train"]["steps"]
    yield f"run {report['run']}", report["status"] + (f": {cause['message']}" if (cause := _end(report)) else "")
    yield "steps", f"{steps:,} of {goal:,}, {report['samples']:,} samples"
    if report["loss"]:
        yield "final loss", f"{float(report['loss'][-1][1]):.4f}"
    if report["evaluation"]:
        of_step = report["evaluation"]["step"]
        yield "validation", ("" if of_step == steps else f"of step {of_step:,}: ") + _beside_gzip(report["evaluation"])
    yield "throughput", f"{report['throughput']['tokens_per_s']:,.0f} tokens/s"
    yield "failures", _survived(report)
    yield "goodput", f"{percent(report['goodput']['ratio'])} of {seconds_text(report['wall_s'])}: {_ledger(report)}"
    if report["cost"]:
        yield "cost", _cost(report["cost"])
    if report["energy"]:
        yield "energy", energy_text(report["energy"])
    kept = [c for c in report["checkpoints"] if not c["removed"]]
    newest = f", newest of step {kept[-1]['step']:,}" if kept else ""
    yield "checkpoints", f"{len(report['checkpoints'])} written, {len(kept)} kept{newest}"
    for said, times in Counter(f"{w['topic']}: {w['message']}" for w in report["warnings"]).items():
        yield "warning", said + (f" ({times} times)" if times > 1 else "")
    for refused in report["rejected_checkpoints"]:
        yield "refused", f"checkpoint of step {refused['step']:,}: {refused['problem']}"


def _cost(cost: dict[str, Any]) -> str:
    """The currency is the reader's."""
    a_million = cost["per_million_tokens"]
    each = "" if a_million is None else f", {a_million:.4g} for a million tokens"
    return f"{cost['total']:.4g}{each}, at {cost['worker_cost_per_hour']:g} for an hour of a worker"


def _end(report: Report) -> dict[str, Any] | None:
    cause: dict[str, Any] | None = report["attempts"][-1]["cause"]
    return cause


def _beside_gzip(evaluation: dict[str, Any]) -> str:
    model, gzip = evaluation["bits_per_byte"], evaluation["gzip_bits_per_byte"]
    if model is None:
        return f"loss {evaluation['loss']:.4f}"
    shares = f"{100 * abs(1 - model / gzip):.0f} %"
    verdict = f"{shares} fewer than" if model < gzip else f"{shares} more than" if model > gzip else "as many as"
    return f"{model:.3f} bits per byte, {verdict} gzip -9 needs for the same text ({gzip:.3f})"


def _survived(report: Report) -> str:
    failures = report["failures"]
    recovered = [f["recovered_s"] for f in failures if f["recovered_s"] is not None]
    lost = f"{count_text(report['lost_steps'], 'step')} lost"
    deaths = sum(attempt["status"] is None for attempt in report["attempts"][:-1])
    if deaths:
        lost += f", the driver died {count_text(deaths, 'time')} and was submitted again"
    if not failures:
        return f"none, {lost}" if report["lost_steps"] or deaths else "none"
    times = f", first new step after {', '.join(map(seconds_text, recovered))}" if recovered else ""
    return f"{len(failures)}, {len(recovered)} survived, {lost}{times}"


def _ledger(report: Report) -> str:
    buckets = {k: v for k, v in report["goodput"].items() if k not in ("wall_s", "ratio") and v >= 0.005}
    largest = sorted(buckets.items(), key=lambda bucket: -bucket[1])
    return ", ".join(f"{name.replace('_', ' ')} {seconds_text(value)}" for name, value in largest)


def _failures(report: Report) -> str:
    lines = []
    for failure in report["failures"]:
        line = f"step {failure['step']}  {who_text(failure)} on node {failure['node']}: {failure['cause']['message']}"
        line += f"; detected in {seconds_text(failure['detected_s'])}"
        if failure["recovered_s"] is not None:
            took, source = seconds_text(failure["recovered_s"]), source_text(failure["source"])
            line += f", first new step after {took} from {source}"
            line += f", {count_text(failure['lost_steps'], 'step')} lost, {failure['continuation']}"
        lines.append(line)
        if failure["recovered_s"] is None and failure["cause"]["traceback"]:
            lines.append(failure["cause"]["traceback"].rstrip())
    return "\n".join(lines)


def _sample(report: Report) -> str:
    sample = report["evaluation"] and report["evaluation"]["sample"]
    return f"{SAMPLE_HEADING}\n{sample}\n{'-' * len(SAMPLE_HEADING)}" if sample else ""


def _columns(rows: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> str:
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
