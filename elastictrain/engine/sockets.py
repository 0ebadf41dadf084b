"""Finding the TCP connections of a process group in a process that has others, and breaking them without loss.

Gloo has no way to interrupt a collective that waits for a rank which is alive but silent, except that its connection
ends. Gloo's devices each own one listener, and every connection of theirs was either accepted there (its local end is
my listener's address) or made to a peer's listener (its remote end is that address). Listeners are rare and are made
under our eyes, so they identify the connections, whenever those appear and whatever other threads open meanwhile.

How a connection ends matters. When a write fails at once (EPIPE, ECONNRESET), gloo forgets to tell the collective that
waits for it, which then hangs until its timeout: 2 to 4 of 100 aborts with SHUT_RDWR, on two cores. So only the reading
side is shut, which gloo's loop sees as the end and handles for reads and writes alike; and a duplicate of each socket
is kept until all is torn down, so that gloo's close does not reset the connection under a peer that still writes.
Cost: one pass over the open files, about 10 us each.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager

Address = tuple[str, int]
"""Numeric IP address and port."""

_SIOCGIFADDR = 0x8915
"""Linux: ask for an interface's address; the answer holds it in bytes 20 to 24 (netdevice(7))."""


def listeners() -> frozenset[Address]:
    """Addresses on which this process listens for TCP connections now."""
    found = set()
    for sock in _tcp_sockets():
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            found.add(_address(sock.getsockname()))
    return frozenset(found)


def end_reading(
    mine: Collection[Address], peers: Collection[Address], held: dict[tuple[Address, Address], socket.socket]
) -> None:
    """End what can be read from every connection accepted at an address in `mine` or made to one in `peers`.

    Whoever waits on one of them learns at once. A duplicate of each goes into `held`, by its two ends, and holds the
    connection open: close them last.
    """
    for sock in _tcp_sockets():
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            continue
        try:
            ends = _address(sock.getsockname()), _address(sock.getpeername())
            if ends not in held and (ends[0] in mine or ends[1] in peers):
                held[ends] = sock.dup()
                sock.shutdown(socket.SHUT_RD)
        except OSError:
            continue  # not connected any more: what we wanted


def interface_with(address: str) -> str | None:
    """Name of the network interface whose primary IPv4 address this is; None when there is none, or not on Linux."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(query, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


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
