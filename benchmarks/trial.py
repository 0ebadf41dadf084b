"""One trial: what is done to whom, and a folder that takes its processes with it when it goes.

Every process of a trial inherits the folder's path in its environment. What is still there when the trial is over, such
as orphans of a node that was killed, is found by that mark and killed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

MARK = "ELASTICTRAIN_TRIAL"
WORLD_SIZE = 2

Fault = Literal["worker", "node", "join"]


@dataclass(frozen=True, slots=True)
class Trial:
    """One fault, the same for whoever has to bear it."""

    name: str
    fault: Fault
    """SIGKILL of a rank's process; of its whole node; or, of one node, a second one that comes."""
    zero_stage: int
    rank: int
    """Whose process or node is killed, unless that is the head's; or who comes with the node."""
    offset: int
    """Steps after a checkpoint at which it happens."""
    wait_s: float
    """And seconds after that."""
    checkpoint_every: int
    limit_s: float
    """How long to wait for the first new step."""
    spare_nodes: int = 0

    @property
    def num_nodes(self) -> int:
        """Nodes at the start."""
        return 1 if self.fault == "join" else WORLD_SIZE + self.spare_nodes

    @property
    def num_ranks(self) -> int:
        """Ranks at the start."""
        return 1 if self.fault == "join" else WORLD_SIZE


@contextmanager
def processes_of(folder: Path) -> Iterator[None]:
    """All that is started in the block ends with it."""
    os.environ[MARK] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(MARK)
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == str(folder):
                    process.kill()
