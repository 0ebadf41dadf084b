"""What all peers share: the job that they are given, and the notes that its ranks write of what they do.

A rank notes: loop (the training function was entered), imported, engine, restored, step, checkpoint, failed. `group`
tells which group a note belongs to; where it is left out, every group has processes of its own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

Note = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setup:
    """One job."""

    name: str
    engine: Literal["deepspeed", "ddp"]
    config: dict[str, Any]
    """An elastictrain config; model, data, optimisation, ZeRO stage and world sizes are taken from it."""
    data_folder: str
    """Token shards that elastictrain has prepared."""
    storage: str
    """For checkpoints."""
    checkpoint_every: int
    events: str
    """File to append notes to."""

    @classmethod
    def read(cls, path: str) -> Setup:
        """From a JSON file."""
        return cls(**json.loads(Path(path).read_text()))


def note(path: str, event: str, **fields: Any) -> None:
    """Append one line; a line this short is written whole, whoever else writes."""
    with open(path, "a") as file:
        file.write(json.dumps({"event": event, "at": time.time(), "pid": os.getpid(), **fields}) + "\n")


def teller(path: str, rank: int, world_size: int) -> Callable[..., None]:
    """`note` for one rank."""

    born = psutil.Process().create_time()

    def tell(event: str, step: int = 0, **fields: Any) -> None:
        note(path, event, **{"rank": rank, "world_size": world_size, "step": step, "born": born, **fields})

    return tell


def read_notes(path: Path) -> list[Note]:
    """What has been appended so far."""
    return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []
