"""Nodes that are a process each, the agent, with ranks as its children: how torchrun and torchft run."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from two_nodes import Job, last_words

LISTEN_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
"""Agents give their ranks half a minute, and these may be waiting for each other."""


@dataclass
class Agents(ABC):
    """A job whose nodes are agents; the first of them is the head. See `strike_peer.PeerJob`."""

    folder: Path
    described: str
    """Path of the file that tells ranks what to do."""
    jobs: list[Job] = field(default_factory=list, kw_only=True)

    @abstractmethod
    def command(self, number: int) -> list[str]:
        """That starts the agent of this node."""

    def environment(self, number: int) -> dict[str, str]:
        """Beside what this process has."""
        return {}

    def add_node(self) -> None:
        """Start one more agent."""
        number = len(self.jobs)
        log = self.folder / f"agent-{number}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment(number)}
        with log.open("wb") as file:
            process = subprocess.Popen(
                self.command(number), stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=self.folder
            )
        self.jobs.append(Job(process, log))

    def require_running(self) -> None:
        """As long as any agent runs the job may come back."""
        if all(job.process.poll() is not None for job in self.jobs):
            raise RuntimeError(f"all agents ended; the first one's last words:\n{last_words(self.jobs[0].log)}")

    def on_head(self, pid: int) -> bool:
        """Whether the first agent is this rank's."""
        return self.jobs[0].process.pid in _ancestors(pid)

    def kill_node_of(self, pid: int) -> None:
        """The agent and what it started."""
        agent = next(job.process.pid for job in self.jobs if job.process.pid in _ancestors(pid))
        _kill([agent])

    def close(self) -> None:
        """SIGTERM to the agents, which end their ranks; SIGKILL to what does not go."""
        for job in self.jobs:
            job.process.terminate()
        for job in self.jobs:
            try:
                job.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                _kill([job.process.pid])
                job.process.wait()


def free_port() -> int:
    """That nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_until_listening(port: int, require_running: Callable[[], None]) -> None:
    """Until this port of 127.0.0.1 takes connections; raises RuntimeError when whoever was to listen has ended."""
    end = time.monotonic() + LISTEN_TIMEOUT_S
    while True:
        require_running()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > end:
            raise RuntimeError(f"nobody listens on port {port} after {LISTEN_TIMEOUT_S:.0f} s")
        time.sleep(0.1)


def _ancestors(pid: int) -> set[int]:
    return {process.pid for process in psutil.Process(pid).parents()}


def _kill(pids: list[int]) -> None:
    doomed = [child for pid in pids for child in psutil.Process(pid).children(recursive=True)]
    for process in [*map(psutil.Process, pids), *doomed]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
