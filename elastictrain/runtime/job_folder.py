"""The folder of a submitted job: a passing copy of the user's, which may go away under the job that runs in it.

Several Ray nodes on one machine share the place where Ray unpacks it. When the job first needs a node, that node's
agent removes what lies there and unpacks it again. Where the copy holds this package too, as with `--working-dir .` in
a clone, a driver that imports something at that moment finds half of it: so it imports all that it may need before it
needs a node. Workers that meet the same are started again, as after any failed start.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from pathlib import Path

_JOB_FOLDER = "/runtime_resources/working_dir_files/"
"""Where Ray unpacks the copy of the working directory in which a submitted job runs."""
_PACKAGE = Path(__file__).resolve().parents[1]
_NEVER = (
    "__main__",
    "cli",
    "doctor",
    "engine",
    "export",
    "runtime.evaluate",
    "runtime.rank",
    "runtime.spoiled",
    "sweep",
)
"""What the driver of a run does not import, or has imported by then."""
_OF_MODELS = ("workloads", "data.heldout", "data.samples", "data.shards", "data.stream", "runtime.bad_steps")
"""They bring torch, which a driver needs only to look at a model of the user's."""


def in_job_folder() -> bool:
    """Whether this process runs in such a copy."""
    return _JOB_FOLDER in os.getcwd()


def import_all(own_model: bool) -> None:
    """Import what a driver may need, if it comes from such a copy: 0.1 s, and torch's 2 s with a model of one's own."""
    if _JOB_FOLDER not in str(_PACKAGE):
        return
    left_out = tuple(f"{_PACKAGE.name}.{name}" for name in (_NEVER if own_model else (*_NEVER, *_OF_MODELS)))
    for module in pkgutil.walk_packages([str(_PACKAGE)], f"{_PACKAGE.name}."):
        if not module.name.startswith(left_out):
            importlib.import_module(module.name)
