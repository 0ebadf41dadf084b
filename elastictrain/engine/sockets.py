"""Finding the TCP sockets of a process group in a process that has others, and shutting them down.

Gloo has no way to interrupt a collective that waits for a rank which is alive but silent, except that its connection
ends. Gloo's devices each own one listener, and every connection of theirs was either accepted there (its local end is
my listener's address) or made to a peer's listener (its remote end is that address). Listeners are rare and are made
under our eyes, so they identify the connections, whenever those appear and whatever other threads open meanwhile.
Cost: one pass over the open files, about 10 us each.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager

Address = tuple[str, int]
"""Numeric IP address and port."""


def listeners() -> frozenset[Address]:
    """Addresses on which this process listens for TCP connections now."""
    found = set()
    for sock in _tcp_sockets():
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            found.add(_address(sock.getsockname()))
    return frozenset(found)


def shut_connections(mine: Collection[Address], peers: Collection[Address]) -> int:
    """End every connection that was accepted at an address in `mine` or made to one in `peers`; returns how many.

    Blocked reads and writes on them fail at once, in this process and in the peer's. The files stay open: whoever owns
    them closes them.
    """
    count = 0
    for sock in _tcp_sockets():
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            continue
        try:
            if _address(sock.getsockname()) in mine or _address(sock.getpeername()) in peers:
                sock.shutdown(socket.SHUT_RDWR)
                count += 1
        except OSError:
            continue  # not connected any more: what we wanted
    return count


def loopback_interface() -> str:
    """Name of the loopback interface: lo on Linux, lo0 elsewhere."""
    return next(name for _, name in socket.if_nameindex() if name in ("lo", "lo0"))


def _tcp_sockets() -> Iterator[socket.socket]:
    for name in os.listdir("/dev/fd"):
        with _duplicate(int(name)) as sock:
            if sock is not None:
                yield sock


@contextmanager
def _duplicate(fd: int) -> Iterator[socket.socket | None]:
    # A duplicate pins the open socket, so that its owner may close and reuse the number while we look.
    try:
        copy = os.dup(fd)
    except OSError:
        yield None
        return
    if not stat.S_ISSOCK(os.fstat(copy).st_mode):
        os.close(copy)
        yield None
        return
    with socket.socket(fileno=copy) as sock:
        inet = sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
        yield sock if inet else None


def _address(raw: tuple[str, int] | tuple[str, int, int, int]) -> Address:
    # An IPv4 peer of an IPv6 socket shows up as ::ffff:a.b.c.d.
    return raw[0].removeprefix("::ffff:"), raw[1]
