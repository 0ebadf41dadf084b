"""`elastictrain train`: load the config, train, tell how it went."""

from __future__ import annotations

import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elastictrain.cli.outcome import STOPPED

if TYPE_CHECKING:
    from elastictrain.config import TrainConfig


def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file that describes the run.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Fields to change, such as train.steps=50.", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the config, also against a run of its name; print it.")
    ] = False,
) -> None:
    """Train a run, or continue it."""
    from elastictrain.config import TrainConfig
    from elastictrain.inputs import check_inputs

    resolved = TrainConfig.load(config, overrides or [])
    if dry_run:
        check_inputs(resolved)
        _check_begun(resolved)
        typer.echo(resolved.to_yaml(), nl=False)
        return
    raise typer.Exit(run_training(resolved))


def _check_begun(config: TrainConfig) -> None:
    """Raise RunConflictError where the run of this name has begun, and can't go on with this config."""
    place = config.run.storage
    if "://" not in place and not Path(place).expanduser().joinpath(config.run.name, "journal").is_dir():
        return
    from elastictrain.cli.runs import StoredRun
    from elastictrain.events import GenerationStarted, StepCommitted
    from elastictrain.runtime.home import CONFIG, refuse_fewer_steps, refuse_other_config, settled
    from elastictrain.storage import Storage

    config = settled(config)
    run = StoredRun(config.run.name, Storage.open(config.run.storage).run(config.run.name))
    begun, done = False, 0
    for event in run.history():
        begun = begun or isinstance(event, GenerationStarted)
        done = max(done, event.step) if isinstance(event, StepCommitted) else done
    if begun and run.storage.exists(CONFIG):
        refuse_other_config(config, run.storage.read(CONFIG), run.storage.uri)
    refuse_fewer_steps(config, done)


def run_training(config: TrainConfig) -> int:
    """Train to the end with progress on stdout, print the summary, return the exit status.

    Raises what ElasticTrainer.fit raises.
    """
    from elastictrain.cli.summary import ended_at, summary
    from elastictrain.inputs import check_inputs
    from elastictrain.progress import progress_on

    check_inputs(config)  # before seconds of imports
    from elastictrain.trainer import ElasticTrainer

    begun_at = time.time()
    with closing(progress_on(sys.stdout)) as progress:
        result = ElasticTrainer(config, progress=progress).fit()
    with suppress(OSError):  # a terminal that was closed has stopped the run, and reads no summary
        typer.echo(summary(result))
        if ended_at(result.report_data) < begun_at:
            typer.echo("\nThe run was complete before: nothing to do. More train.steps continue it.")
        elif result.status != "complete":
            typer.echo("\nThe same command goes on from here.")
    return 0 if result.status == "complete" else STOPPED
