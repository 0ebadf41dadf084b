"""torchrun elastic as a peer: an agent for each node, rendezvous in the first one's store, DDP with checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from peers.agents import Agents, free_port, wait_until_listening
from peers.notes import Setup
from strike_peer import described
from trial import WORLD_SIZE

SCRIPT = Path(__file__).with_name("torchrun_rank.py")
MAX_RESTARTS = 20


@dataclass(frozen=True)
class Torchrun:
    """See `strike_peer.Peer`."""

    key: str = "torchrun"
    title: str = "torchrun elastic, DDP"
    sharded: bool = False

    @contextmanager
    def begin(self, setup: Setup, folder: Path, num_nodes: int) -> Iterator[Agents]:
        """See `strike_peer.Peer`."""
        Path(setup.storage).mkdir()
        job = TorchrunJob(folder, described(setup, folder), free_port())
        try:
            for _ in range(num_nodes):
                job.add_node()
                # an agent that comes before the first one listens would open a store of its own
                wait_until_listening(job.port, job.require_running)
            yield job
        finally:
            job.close()


@dataclass
class TorchrunJob(Agents):
    """See `strike_peer.PeerJob`."""

    port: int = field(default=0)

    def command(self, number: int) -> list[str]:
        """The first agent serves the store, so its node is the head."""
        return [
            *(sys.executable, "-m", "torch.distributed.run"),
            f"--nnodes=1:{WORLD_SIZE}",
            "--nproc-per-node=1",
            f"--max-restarts={MAX_RESTARTS}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{self.port}",
            "--rdzv-id=job",
            "--local-addr=127.0.0.1",
            *(str(SCRIPT), self.described),
        ]

    def environment(self, number: int) -> dict[str, str]:
        """Without this a restart can hang with torch 2.13: ranks meet in the store of the rounds before.

        `_create_c10d_store` counts on a new store for each round, and the agent keeps the first one.
        """
        return {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


TORCHRUN = Torchrun()
