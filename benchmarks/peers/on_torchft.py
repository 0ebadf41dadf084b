"""torchft as a peer: a lighthouse, and a replica group of one rank on each node, restarted by its own torchrun."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from peers.agents import Agents, free_port, wait_until_listening
from peers.notes import Setup
from strike_peer import described
from two_nodes import running

SCRIPT = Path(__file__).with_name("torchft_rank.py")
LIGHTHOUSE = Path(__file__).with_name("torchft_lighthouse.py")
MAX_RESTARTS = 20
JOIN_TIMEOUT_MS = 10_000
"""How long a quorum waits for replicas that are late: as in torchft's own example. Its other times are its defaults."""


def installed() -> bool:
    """Whether Python finds it."""
    return find_spec("torchft") is not None


@dataclass(frozen=True)
class Torchft:
    """See `strike_peer.Peer`."""

    key: str = "torchft"
    title: str = "torchft, DDP"
    sharded: bool = False

    @contextmanager
    def begin(self, setup: Setup, folder: Path, num_nodes: int) -> Iterator[Agents]:
        """See `strike_peer.Peer`."""
        port = free_port()
        lighthouse = [sys.executable, str(LIGHTHOUSE), str(port), str(JOIN_TIMEOUT_MS)]
        job = TorchftJob(folder, described(setup, folder), f"http://127.0.0.1:{port}")
        with running(lighthouse, folder / "lighthouse.log", ray_address="") as watching:
            wait_until_listening(port, watching.require_running)
            try:
                for _ in range(num_nodes):
                    job.add_node()
                yield job
            finally:
                job.close()


@dataclass
class TorchftJob(Agents):
    """See `strike_peer.PeerJob`."""

    lighthouse: str = field(default="")

    def command(self, number: int) -> list[str]:
        """A replica group is a torchrun of its own."""
        return [
            *(sys.executable, "-m", "torch.distributed.run"),
            "--nnodes=1",
            "--nproc-per-node=1",
            f"--max-restarts={MAX_RESTARTS}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{free_port()}",
            "--local-addr=127.0.0.1",
            *(str(SCRIPT), self.described),
        ]

    def environment(self, number: int) -> dict[str, str]:
        """As torchft's own example has it."""
        return {"TORCHFT_LIGHTHOUSE": self.lighthouse, "REPLICA_GROUP_ID": str(number)}


TORCHFT = Torchft()
