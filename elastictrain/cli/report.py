"""`elastictrain report`: what happened in a run, in words, as JSON, or as one HTML file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from elastictrain.cli.completion import run_names
from elastictrain.cli.runs import find_run
from elastictrain.errors import ConfigError, DataError


def report(
    run: Annotated[
        str, typer.Argument(metavar="RUN", autocompletion=run_names, help="Name of the run.", show_default=False)
    ],
    storage: Annotated[str, typer.Option(metavar="DIR", help="Folder or URI that holds the runs.")] = "runs/",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; docs/report.md describes it.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one self-contained HTML file.")] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the loss curve as a picture.")] = None,
) -> None:
    """Tell what happened in a run.

    Losses, failures and recoveries, where the time went, checkpoints.
    """
    from elastictrain.cli.summary import summarise
    from elastictrain.tracking.exact_json import dumps
    from elastictrain.tracking.report import build_report

    stored = find_run(storage, run)
    driven = stored.driven(stored.status())
    try:
        told = build_report(stored.events(), time.time() if driven else None, stored.delivered)
    except ValueError as error:
        raise DataError(f"run {run} in {stored.storage.uri} has nothing to report yet: {error}") from None
    if html is not None:
        from elastictrain.tracking.html import render_html

        _write("--html", html, render_html(told), quiet=as_json)
    if svg is not None:
        from elastictrain.tracking.chart import standalone_svg

        _write("--svg", svg, standalone_svg(told), quiet=as_json)
    if as_json:
        typer.echo(dumps(told, indent=2))
    elif html is None and svg is None:
        typer.echo(summarise(told))


def _write(option: str, path: Path, text: str, *, quiet: bool) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"can't write {option} {path}: {error.strerror}. Name a file in a writable folder.") from None
    if not quiet:
        typer.echo(f"written to {path}")
