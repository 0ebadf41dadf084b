"""`elastictrain runs`: the runs of a storage side by side, and in what their configs differ."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import typer

from elastictrain.cli.completion import run_names
from elastictrain.cli.runs import StoredRun, all_runs, find_run
from elastictrain.errors import DataError
from elastictrain.sentences import percent
from elastictrain.tracking.wording import seconds_text

Row = dict[str, Any]

_NOT_COMPARED = ("run.name", "run.storage", "faults")
MAX_WIDTH = 24
"""Of a config's value in the table."""


def runs(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...",
            autocompletion=run_names,
            help="Names of runs; without any, all of them.",
            show_default=False,
        ),
    ] = None,
    storage: Annotated[str, typer.Option(metavar="DIR", help="Folder or URI that holds the runs.")] = "runs/",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; docs/tracking.md describes it.")] = False,
) -> None:
    """List runs and compare them.

    Newest first. Named runs are shown with the fields of the config in which they differ.
    """
    from elastictrain.tracking.exact_json import dumps

    found = map(_row, (find_run(storage, name) for name in names)) if names else _readable(all_runs(storage))
    rows = sorted(filter(None, found), key=lambda row: -row["started_at"])
    _differences(rows)
    if as_json:
        typer.echo(dumps(rows, indent=2))
        return
    typer.echo(aligned(_figures(rows), left=2))
    if names and rows and rows[0]["differs"]:
        typer.echo("\n" + aligned(_fields(rows), left=1 + len(rows)))


def _readable(found: Iterable[StoredRun]) -> Iterator[Row | None]:
    """Their rows; one that is damaged is told of, and hides none of the others."""
    for run in found:
        try:
            yield _row(run)
        except DataError as error:
            typer.echo(f"run {run.name} is left out: {error}", err=True)


def _row(run: StoredRun) -> Row | None:
    """What there is to compare of a run; None before it has told anything."""
    from elastictrain.config import flatten
    from elastictrain.tracking.report import build_report

    driven = run.driven(run.status())
    try:
        report = build_report(run.events(), time.time() if driven else None, run.delivered)
    except ValueError:
        return None
    evaluation, cost = report["evaluation"], report["cost"]
    return {
        "run": run.name,
        "status": report["status"],
        "steps": report["steps"],
        "of_steps": report["config"]["train"]["steps"],
        "loss": report["loss"][-1][1] if report["loss"] else None,
        "bits_per_byte": evaluation["bits_per_byte"] if evaluation else None,
        "world_size": report["generations"][-1]["world_size"] if report["generations"] else 0,
        "tokens_per_s": report["throughput"]["tokens_per_s"],
        "goodput": report["goodput"]["ratio"],
        "attempts": len(report["attempts"]),
        "failures": len(report["failures"]),
        "lost_steps": report["lost_steps"],
        "cost": cost["total"] if cost else None,
        "started_at": report["started_at"],
        "wall_s": report["wall_s"],
        "differs": dict(flatten(report["config"])),
    }


def _differences(rows: Sequence[Row]) -> None:
    """Keep of each config the fields in which the runs differ."""
    fields = {field for row in rows for field in row["differs"] if not field.startswith(_NOT_COMPARED)}
    differing = sorted(f for f in fields if len({repr(row["differs"].get(f)) for row in rows}) > 1)
    for row in rows:
        row["differs"] = {field: row["differs"].get(field) for field in differing}


def _figures(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    yield "run", "status", "steps", "loss", "bits/byte", "workers", "tokens/s", "goodput", "failures", "lost", "time"
    for row in rows:
        yield (
            row["run"],
            row["status"],
            f"{row['steps']}/{row['of_steps']}",
            _number(row["loss"], ".4f"),
            _number(row["bits_per_byte"], ".3f"),
            str(row["world_size"]),
            _number(row["tokens_per_s"], ",.0f"),
            percent(row["goodput"]),
            str(row["failures"]),
            str(row["lost_steps"]),
            seconds_text(row["wall_s"]),
        )


def _fields(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    yield "config", *(row["run"] for row in rows)
    for field in rows[0]["differs"]:
        values = (str(row["differs"][field]) for row in rows)
        yield field, *(v if len(v) <= MAX_WIDTH else f"{v[: MAX_WIDTH - 1]}…" for v in values)


def aligned(lines: Iterable[tuple[str, ...]], left: int) -> str:
    """As columns, the first `left` of them to the left, the others to the right."""
    table = list(lines)
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in table
    )


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)
