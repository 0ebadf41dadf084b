"""On what an attempt runs: versions, host and process, as the record of a run keeps them."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import version

from elastictrain.tracking.redact import redact_command


def environment() -> dict[str, str]:
    """As texts, by name."""
    packages = {name: version(name) for name in ("torch", "ray", "deepspeed", "mlflow", "elastictrain")}
    return {
        "python": platform.python_version(),
        **packages,
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "git_commit": _git_commit(),
        "command": redact_command(sys.argv),
    }


def _git_commit() -> str:
    if told := os.environ.get("GIT_COMMIT"):  # where there is no repository: a submitted job's folder has no .git
        return told
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
