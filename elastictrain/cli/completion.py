"""What the shell offers where a command takes the name of a run. It looks into a folder, and asks no network."""

from __future__ import annotations

from pathlib import Path

import typer


def run_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Runs of the storage that is named so far, or of runs/."""
    storage = str(ctx.params.get("storage") or "runs/")
    if "://" in storage:
        return []
    return sorted(path.parent.name for path in Path(storage).expanduser().glob(f"{incomplete}*/config.json"))
