"""Knowing at once that a process on this node died, when, and of what.

A pidfd becomes readable the moment its process exits, whoever the parent is, so no polling interval and no Ray
time-out stands between a death and its detection. Since Linux 6.15 the pidfd also tells the exit status; before that,
a zombie's status is read from /proc while it lasts. One thread watches all processes of a node.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from elastictrain.events import Cause

_PIDFD_GET_INFO = (3 << 30) | (64 << 16) | (0xFF << 8) | 11
"""_IOWR(PIDFS_IOCTL_MAGIC, 11, struct pidfd_info), include/uapi/linux/pidfd.h."""
_INFO_EXIT = 1 << 3
_STATUS_PATIENCE_S = 0.05
"""How long to wait for the parent to reap, which is when the kernel gives out the status."""


class ProcessWatch:
    """Watches processes by pid and calls `on_exit(key, at, cause)` from its thread once for each that ends."""

    def __init__(self, on_exit: Callable[[str, float, Cause], None]) -> None:
        self._on_exit = on_exit
        self._keys: dict[int, tuple[str, int]] = {}
        self._lock = threading.Lock()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._closed = False
        self._poll = select.poll()
        self._poll.register(self._wake_read, select.POLLIN)
        self._thread = threading.Thread(target=self._watch, name="process-watch", daemon=True)
        self._thread.start()

    def add(self, key: str, pid: int) -> None:
        """Watch this process; one that is gone already is reported right away."""
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._on_exit(key, time.time(), Cause("unknown", "the process ended before it could be watched"))
            return
        with self._lock:
            self._keys[fd] = (key, pid)
            self._poll.register(fd, select.POLLIN)
        os.write(self._wake_write, b"\0")

    def kill(self) -> None:
        """SIGKILL every process that is watched; each is told of when it is gone."""
        with self._lock:
            for fd in self._keys:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)

    def close(self) -> None:
        """Stop watching and join the thread."""
        self._closed = True
        os.write(self._wake_write, b"\0")
        self._thread.join()
        with self._lock:
            for fd in [*self._keys, self._wake_read, self._wake_write]:
                os.close(fd)
            self._keys.clear()

    def _watch(self) -> None:
        while not self._closed:
            for fd, _ in self._poll.poll():
                if fd == self._wake_read:
                    with suppress(BlockingIOError):
                        os.read(fd, 4096)
                    continue
                at = time.time()
                with self._lock:
                    key, pid = self._keys.pop(fd)
                    self._poll.unregister(fd)
                cause = _cause(_wait_status(fd, pid))
                os.close(fd)
                self._on_exit(key, at, cause)


def is_stopped(pid: int) -> bool:
    """Whether the process is stopped by a signal or a debugger; False when it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def _wait_status(fd: int, pid: int) -> int | None:
    """The process's wait status (as of waitpid), or None where the kernel keeps it to itself."""
    end = time.monotonic() + _STATUS_PATIENCE_S
    while True:
        # first the kernel, which knows once the parent has reaped, then /proc, which knows until then (a parent that
        # ignores SIGCHLD leaves no zombie: X for a moment); it may be reaped between the two, so both are asked again
        info = bytearray(64)
        struct.pack_into("Q", info, 0, _INFO_EXIT)
        try:
            fcntl.ioctl(fd, _PIDFD_GET_INFO, info)
            if struct.unpack_from("Q", info)[0] & _INFO_EXIT:
                return int(struct.unpack_from("i", info, 60)[0])
        except OSError:
            pass  # an older kernel
        try:
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            if fields[0] in ("Z", "X"):
                return int(fields[-1])
        except (OSError, ValueError):
            pass
        if time.monotonic() > end:
            return None
        time.sleep(0.001)


def _cause(status: int | None) -> Cause:
    if status is None:
        return Cause("unknown", "the process vanished (killed, or exited without a word)")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return Cause("signal", name)
    return Cause("exit", f"exit code {os.WEXITSTATUS(status)}")
