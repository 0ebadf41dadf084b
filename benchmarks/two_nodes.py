"""Ray nodes on this machine, mostly a CPU each, for whichever peer is measured; and jobs that end when told to.

The nodes have addresses of their own (127.0.0.11 and up), so that an embedded cluster can run beside them, and a token
of their own. Starting them takes 5 to 10 s. Everything ends with the block, however that ends.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

FIRST_HOST = 11
OBJECT_STORE_BYTES = 150 * 2**20
STOP_TIMEOUT_S = 60.0
_SHOWN_LINES = 30
_TOKEN = secrets.token_hex(32)
"""One for all clusters of this process: Ray reads it once."""


@contextmanager
def two_nodes() -> Iterator[str]:
    """Gives the cluster's address; the environment has the token for child processes."""
    with local_nodes(2) as nodes:
        yield str(nodes.cluster.address)


@dataclass
class Nodes:
    """A local cluster to which nodes can be added."""

    cluster: Any
    node: dict[str, Any]
    """What each of them is like, for Ray."""
    num_added: int = 0

    @property
    def address(self) -> str:
        """For Ray's clients."""
        return str(self.cluster.address)

    def on_head(self, pid: int) -> bool:
        """Whether the head node has this process: a node with it is not to be killed, since the driver is there."""
        return bool(psutil.Process(pid).ppid() == self._raylet(self.cluster.head_node))

    def kill_node_of(self, pid: int) -> None:
        """SIGKILL to the raylet of this process and to everything that it started."""
        raylet = psutil.Process(pid).parent()
        assert raylet is not None
        doomed = [raylet, *raylet.children(recursive=True)]
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def replace_dead(self) -> None:
        """Forget nodes that were killed, and start one for each."""
        for node in list(self.cluster.worker_nodes):
            if node.all_processes["raylet"][0].process.poll() is not None:
                self.cluster.remove_node(node, allow_graceful=False)
                self.add()

    def _raylet(self, node: Any) -> int:
        return int(node.all_processes["raylet"][0].process.pid)

    def add(self) -> Any:
        """One more node, at the next address."""
        self.num_added += 1
        return self.cluster.add_node(**self.node, node_ip_address=_host(self.num_added))


@contextmanager
def local_nodes(count: int, num_cpus: int = 1) -> Iterator[Nodes]:
    """So many nodes with so many CPUs each, the head among them.

    Ray's files are in a folder of their own: its sockets' paths have a limit.
    """
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        os.environ |= {
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": _TOKEN,
            "OMP_NUM_THREADS": "1",
        }
        os.environ.pop("RAY_ADDRESS", None)
        # after the environment is set: Ray reads some of it when it is imported
        from ray.cluster_utils import Cluster

        temp_dir = Path(folder, "ray")
        temp_dir.mkdir()
        # without a dashboard Ray claims its port all the same
        head = {"temp_dir": str(temp_dir), "include_dashboard": False, "dashboard_port": free_port()}
        node = {"num_cpus": num_cpus, "object_store_memory": OBJECT_STORE_BYTES}
        cluster = Cluster(initialize_head=True, head_node_args={**node, **head, "node_ip_address": _host(0)})
        try:
            nodes = Nodes(cluster, node)
            for _ in range(count - 1):
                nodes.add()
            # each node has set a handler of Ray's, which drains it for half a minute
            end_on_sigterm()
            yield nodes
        finally:
            cluster.shutdown()


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _host(number: int) -> str:
    return f"127.0.0.{FIRST_HOST + number}"


@dataclass
class Job:
    """A job under way, and where its output goes."""

    process: subprocess.Popen[bytes]
    log: Path

    def require_running(self) -> None:
        """Raise RuntimeError with the end of the job's output when it has ended."""
        if self.process.poll() is not None:
            told = last_words(self.log)
            raise RuntimeError(f"the job ended with status {self.process.returncode}; its last words:\n{told}")


def last_words(log: Path) -> str:
    """The end of a job's output."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:])


@contextmanager
def running(command: Sequence[str], log: Path, ray_address: str) -> Iterator[Job]:
    """The command as a job of that cluster; ended with SIGTERM, and SIGKILL if that does not help."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "RAY_ADDRESS": ray_address}
        )
    try:
        yield Job(process, log)
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def end_on_sigterm() -> None:
    """Have SIGTERM end this process the way an exception does, so that what it started is ended too."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
