"""`elastictrain tune`: a sweep over fields of a config; a table of what came of it, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elastictrain.cli.list_runs import aligned
from elastictrain.cli.outcome import STOPPED

if TYPE_CHECKING:
    from elastictrain.config import TrainConfig
    from elastictrain.sweep.record import SweepRecord
    from elastictrain.sweep.space import Sweep


def tune(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file that describes the runs.", show_default=False)
    ],
    space: Annotated[
        Path, typer.Option("--space", metavar="FILE", help="YAML file that says what to try.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Fields to change, such as train.steps=50.", show_default=False),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Workers that all trials share.", show_default=False)
    ] = None,
) -> None:
    """Try values of some fields, or continue a sweep.

    Each trial is an elastic run of its own; docs/tuning.md describes the space file.
    """
    from elastictrain.config import TrainConfig
    from elastictrain.sweep.space import Sweep

    resolved = TrainConfig.load(config, overrides or [])
    sweep = Sweep.load(space, resolved)
    if workers is not None:
        sweep = sweep.model_copy(update={"workers": workers})
    raise typer.Exit(run_tuning(sweep, resolved))


def run_tuning(sweep: Sweep, config: TrainConfig) -> int:
    """Run the sweep to its end with progress on stdout, print the table, return the exit status."""
    from elastictrain.sweep.tuning import run_sweep
    from elastictrain.tracking.sweep_chart import sweep_chart

    record = run_sweep(sweep, config, lambda line: print(line, flush=True))
    record.storage.write_atomic("sweep.svg", sweep_chart(record.told()).encode())
    typer.echo(f"\n{summary(record)}\n\npicture     {record.storage.uri}/sweep.svg")
    if not record.is_over:
        typer.echo("\nThe same command goes on from here.")
    return 0 if record.is_over else STOPPED


def summary(record: SweepRecord) -> str:
    """The table, and why trials failed."""
    from elastictrain.sweep.table import rows

    lines = [aligned(rows(record), left=1)]
    lines += [f"{record.sweep.name}-{t.number} failed: {t.message}" for t in record.ranked() if t.state == "failed"]
    return "\n".join(lines)
