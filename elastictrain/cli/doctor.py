"""`elastictrain doctor`: what this machine has and lacks, and what to do about it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer


def doctor(
    storage: Annotated[str, typer.Option(metavar="DIR", help="Folder or URI where runs would be kept.")] = "runs/",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check what this machine lacks.

    Packages, compiler, ports, disk, memory, GPUs. Exit status 1 when a run can't start here.
    """
    from elastictrain.doctor import examine, worst

    findings = examine(storage)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
        table = Table.grid(padding=(0, 2))
        for finding in findings:
            words = Text(finding.found)
            if finding.advice:
                words.append(f"\n{finding.advice}", style="dim")
            table.add_row(Text(finding.verdict, style=styles[finding.verdict]), finding.check, words)
        Console().print(table)
    if worst(findings) == "fail":
        raise typer.Exit(1)
