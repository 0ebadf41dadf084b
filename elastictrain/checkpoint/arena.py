"""A buffer of memory that two processes of one node share, and that can't leak.

The keeper creates it as an anonymous file in memory (memfd) and owns it; a worker that gets its ticket maps the same
pages through /proc/<pid>/fd/<fd>. So a worker's death leaves the bytes with the keeper, and the death of the last
process that maps them frees them: there is no name in /dev/shm to clean up, whatever was killed. The file is sealed
against resizing, so neither side can take pages away from under the other. Pages are reserved at creation, if the
node (and its container) has that much to give: too little memory is an error there, not a kill in the middle of a copy.

Linux only, and both processes must run as the same user and see each other's /proc (same PID namespace).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

from elastictrain.errors import InfrastructureError

_NAME = "elastictrain-arena"
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class ArenaTicket:
    """Where another process of the same node finds an arena; plain numbers, so that it can be sent."""

    pid: int
    fd: int
    num_bytes: int


class Arena:
    """The memory behind `buffer`. Views of it stay valid for as long as someone holds them, even after `close`."""

    def __init__(self, mapping: mmap.mmap, ticket: ArenaTicket, owned_fd: int | None) -> None:
        self.ticket = ticket
        self._buffer: memoryview | None = memoryview(mapping)[: ticket.num_bytes]
        self._disown = weakref.finalize(self, os.close, owned_fd) if owned_fd is not None else None

    @classmethod
    def create(cls, num_bytes: int) -> Arena:
        """New zeroed memory, owned by this process until `close`."""
        available = _available_bytes()
        if num_bytes > available:
            raise InfrastructureError(
                f"no memory for a snapshot buffer of {num_bytes} bytes: {available} are available. A node holds two "
                f"copies of its own shards and two of its buddy's: use more nodes, or nodes with more memory."
            )
        fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(fd, 0, _mapped(num_bytes))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(mmap.mmap(fd, _mapped(num_bytes)), ArenaTicket(os.getpid(), fd, num_bytes), fd)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open(cls, ticket: ArenaTicket) -> Arena:
        """The arena of another process of this node; raises InfrastructureError when its owner is gone."""
        path = f"/proc/{ticket.pid}/fd/{ticket.fd}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise InfrastructureError(
                f"can't open the snapshot buffer {path}: {error.strerror}. Its keeper (pid {ticket.pid}) is gone, or "
                f"runs as another user or in another PID namespace."
            ) from error
        try:
            if not _is_arena(fd, ticket.num_bytes):
                raise InfrastructureError(
                    f"{path} is no snapshot buffer of {ticket.num_bytes} bytes: its keeper (pid {ticket.pid}) is gone "
                    f"and another process has its number."
                )
            return cls(mmap.mmap(fd, _mapped(ticket.num_bytes)), ticket, None)
        finally:
            os.close(fd)

    @property
    def buffer(self) -> memoryview:
        """All of it, writable."""
        if self._buffer is None:
            raise ValueError("the arena is closed")
        return self._buffer

    def close(self) -> None:
        """Give up this process's hold; closing twice is fine."""
        self._buffer = None
        if self._disown is not None:
            self._disown()


def _mapped(num_bytes: int) -> int:
    return max(num_bytes, 1)  # An empty mapping can't be made.


def _available_bytes() -> int:
    """What the kernel would give without killing anything: of the node, or of the container where that has a limit."""
    meminfo = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    limit = _CGROUP / "memory.max"
    if limit.exists() and (maximum := limit.read_text().strip()) != "max":
        available = min(available, int(maximum) - int((_CGROUP / "memory.current").read_text()))
    return available


def _is_arena(fd: int, num_bytes: int) -> bool:
    name = os.readlink(f"/proc/self/fd/{fd}")
    return name.startswith(f"/memfd:{_NAME}") and os.fstat(fd).st_size == _mapped(num_bytes)
