"""The command line: `elastictrain train`, `plan`, `status`, `top`, `runs`, `report`, `lineage`, `checkpoints`, ...

Commands only read arguments, call the rooms below and print. Whatever is heavy (torch, ray, pyarrow) is imported inside
the command that needs it, so `--help` and `--dry-run` answer in a fraction of a second.
"""

from elastictrain.cli.app import app, main
from elastictrain.cli.outcome import plain_errors
from elastictrain.cli.prepare import run_preparation
from elastictrain.cli.train import run_training
from elastictrain.cli.tune import run_tuning

__all__ = ["app", "main", "plain_errors", "run_preparation", "run_training", "run_tuning"]
