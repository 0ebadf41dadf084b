"""`elastictrain status`: how a run is doing, now."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from elastictrain.cli.completion import run_names
from elastictrain.cli.runs import find_run, newest_run
from elastictrain.status import Status


def status(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN", autocompletion=run_names, help="Name of the run; without it, the newest.", show_default=False
        ),
    ] = None,
    storage: Annotated[str, typer.Option(metavar="DIR", help="Folder or URI that holds the runs.")] = "runs/",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how a run is doing.

    Its state, step, loss and speed, its workers and spares, and the nodes.
    """
    stored = find_run(storage, run) if run else newest_run(storage)
    found = stored.status()
    if found is None:
        found = Status.beginning(stored.name, time.time())
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return

    from rich.console import Console

    from elastictrain.progress import status_table, worker_lines
    from elastictrain.sentences import status_line
    from elastictrain.tracking.wording import seconds_text

    console = Console()
    if console.is_terminal:
        console.print(status_table(found))
    else:
        typer.echo("\n".join([f"run {found.run}  {status_line(found)}", *worker_lines(found)]))
    typer.echo(f"written {seconds_text(max(0.0, time.time() - found.updated_at))} ago, attempt {found.attempt}")
