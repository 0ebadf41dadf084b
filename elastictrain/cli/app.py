"""The commands in one place, with the options that all of them share."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from elastictrain.cli.checkpoints import checkpoints
from elastictrain.cli.doctor import doctor
from elastictrain.cli.export import export
from elastictrain.cli.lineage import lineage
from elastictrain.cli.list_runs import runs
from elastictrain.cli.outcome import plain_errors
from elastictrain.cli.plan import plan
from elastictrain.cli.report import report
from elastictrain.cli.status import status
from elastictrain.cli.top import top
from elastictrain.cli.train import train
from elastictrain.version import __version__

MANUAL = """
Train on a cluster that changes under you: workers die, nodes come and go,
the losses do not.

A run is described by one YAML file and known by its name (run.name). All
about it is kept in one folder or object store (run.storage, default runs/).
Submitting the same file again continues the run from where it stands.

  elastictrain train jobs/llm_tiny.yaml                  train, or continue
  elastictrain train jobs/llm_tiny.yaml train.steps=50   change one field
  elastictrain plan jobs/llm_tiny.yaml                   layout, memory, time
  elastictrain status                                    how it is doing
  elastictrain top                                       watch it
  elastictrain runs                                      all runs side by side
  elastictrain report quickstart --html report.html      what happened
  elastictrain lineage quickstart                        what came from what
  elastictrain checkpoints quickstart --verify           what is kept, checked
  elastictrain export quickstart --to FOLDER             for transformers
  elastictrain doctor                                    what is missing here

Exit status: 0 done; 1 a check failed; 2 bad config, data or arguments; 3 the
run belongs to another config or process; 4 an error in the model or data
code; 5 the cluster can't give what the run needs; 6 no checkpoint can be
read; 130 stopped, and the same command goes on.
"""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        with plain_errors(debug=ctx.params["debug"]):
            return super().invoke(ctx)


app = typer.Typer(
    name="elastictrain",
    cls=_Commands,
    help="\b\n" + MANUAL.strip().replace("\n\n", "\n\n\b\n"),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


def schema() -> None:
    """Print the JSON schema of the config.

    Every field with its type, default and meaning; editors complete YAML from it.
    """
    from elastictrain.config import TrainConfig

    typer.echo(json.dumps(TrainConfig.model_json_schema(), indent=2))


for command in (train, plan, status, top, runs, report, lineage, checkpoints, export, doctor, schema):
    app.command()(command)


def main() -> None:
    """The console script."""
    app(prog_name="elastictrain")
