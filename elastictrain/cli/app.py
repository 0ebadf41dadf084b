"""The commands in one place, with the options that all of them share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from elastictrain.cli.checkpoints import checkpoints
from elastictrain.cli.doctor import doctor
from elastictrain.cli.export import export
from elastictrain.cli.init import init
from elastictrain.cli.lineage import lineage
from elastictrain.cli.list_runs import runs
from elastictrain.cli.outcome import plain_errors
from elastictrain.cli.plan import plan
from elastictrain.cli.report import report
from elastictrain.cli.status import status
from elastictrain.cli.top import top
from elastictrain.cli.train import train
from elastictrain.cli.tune import tune
from elastictrain.version import __version__


def schema() -> None:
    """Print the JSON schema of the config.

    Every field with its type, default and meaning; editors complete YAML from it.
    """
    from elastictrain.config import TrainConfig

    typer.echo(json.dumps(TrainConfig.model_json_schema(), indent=2))


MANUAL = """
Train on a cluster that changes under you: workers die, nodes come and go,
the losses do not.

A run is described by one YAML file and known by its name (run.name). All
about it is kept in one folder or object store (run.storage, default runs/).
Submitting the same file again continues the run from where it stands.

  elastictrain init                                  write llm_tiny.yaml
  elastictrain train llm_tiny.yaml                   train, or continue
  elastictrain train llm_tiny.yaml train.steps=320   change a field: 20 more
  elastictrain top                                   watch it
  elastictrain report quickstart --html report.html  what happened
  elastictrain export quickstart --to FOLDER         take the model

Ctrl-C once stops a run and makes its last step durable; twice ends it at
once. The same command goes on.

Exit status: 0 done; 1 a check failed; 2 bad config, data or arguments; 3 the
run belongs to another config or process; 4 an error in the model or data
code; 5 the cluster can't give what the run needs; 6 no checkpoint can be
read; 130 stopped, and the same command goes on.

Environment: RAY_ADDRESS names the cluster, else a run starts one of its own;
RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH are Ray's token for it. MLflow reads
MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
"""

SECTIONS: dict[str, tuple[Callable[..., None], ...]] = {
    "Begin": (init, plan, doctor, schema),
    "Train": (train, tune),
    "Watch and look back": (status, top, runs, report, lineage),
    "Keep": (checkpoints, export),
}
"""All commands, as `--help` groups them."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        with plain_errors(debug=ctx.params["debug"]):
            return super().invoke(ctx)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(name, self.commands[name].get_short_help_str(60)) for name in (c.__name__ for c in commands)]
                )


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


for command in (command for commands in SECTIONS.values() for command in commands):
    app.command()(command)


def main() -> None:
    """The console script."""
    app(prog_name="elastictrain")
