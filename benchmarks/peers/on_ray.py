"""Ray Train as a peer: its job on local Ray nodes, with DeepSpeed ZeRO or with DDP."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peers.notes import Setup
from strike_peer import described
from two_nodes import Job, Nodes, local_nodes, running

SCRIPT = Path(__file__).with_name("ray_train.py")


@dataclass(frozen=True)
class RayTrain:
    """Either engine of ray_train.py."""

    key: str
    title: str
    sharded: bool

    @contextmanager
    def begin(self, setup: Setup, folder: Path, num_nodes: int) -> Iterator[RayJob]:
        """See `strike_peer.Peer`."""
        with local_nodes(num_nodes) as nodes:
            command = [sys.executable, str(SCRIPT), described(setup, folder)]
            with running(command, folder / "ray_train.log", nodes.address) as job:
                yield RayJob(job, nodes)


@dataclass(frozen=True)
class RayJob:
    """See `strike_peer.PeerJob`."""

    job: Job
    nodes: Nodes

    def require_running(self) -> None:
        """The driver."""
        self.job.require_running()

    def on_head(self, pid: int) -> bool:
        """The driver is there."""
        return self.nodes.on_head(pid)

    def kill_node_of(self, pid: int) -> None:
        """The raylet and what it started."""
        self.nodes.kill_node_of(pid)

    def add_node(self) -> None:
        """A raylet; returns when the cluster knows it."""
        self.nodes.add()


ZERO = RayTrain("ray_train", "Ray Train + DeepSpeed", sharded=True)
DDP = RayTrain("ray_train_ddp", "Ray Train, DDP", sharded=False)
