"""MLflow counts its uses for its makers unless told not to, and keeps a number of the user for it in ~/.config.

It decides while it is imported, by whoever is first: here, or something that a worker imports. So every process that
may import it says so before.
"""

from __future__ import annotations

import os

_REFUSALS = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}


def refuse_telemetry() -> None:
    """Say so, where the user has not said anything."""
    for name, value in _REFUSALS.items():
        os.environ.setdefault(name, value)
