"""Memory shared between processes, whoever of them dies."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from elastictrain.checkpoint.arena import Arena, ArenaTicket
from elastictrain.errors import InfrastructureError

WORKER = """
import os, signal, sys
from elastictrain.checkpoint.arena import Arena, ArenaTicket
arena = Arena.open(ArenaTicket(*map(int, sys.argv[1:])))
arena.buffer[:5] = b"state"
os.kill(os.getpid(), signal.SIGKILL)
"""

KEEPER = """
import sys
from elastictrain.checkpoint.arena import Arena
arena = Arena.create(4096)
arena.buffer[:5] = b"state"
print(arena.ticket.pid, arena.ticket.fd, flush=True)
sys.stdin.read()
"""


def num_arenas() -> int:
    """Descriptors of this process that hold an arena's memory."""
    gc.collect()
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # The listing's own.
            count += "elastictrain-arena" in os.readlink(f"/proc/self/fd/{fd}")
    return count


def test_a_killed_worker_leaves_its_bytes() -> None:
    arena = Arena.create(1 << 16)
    ticket = arena.ticket
    argv = [sys.executable, "-c", WORKER, str(ticket.pid), str(ticket.fd), str(ticket.num_bytes)]
    assert subprocess.run(argv, check=False).returncode == -signal.SIGKILL
    assert bytes(arena.buffer[:6]) == b"state\0"
    arena.close()


def test_a_killed_keeper_leaves_nothing_to_open_and_no_file() -> None:
    files = set(os.listdir("/dev/shm"))
    with subprocess.Popen(
        [sys.executable, "-c", KEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as keeper:
        assert keeper.stdout is not None
        pid, fd = map(int, keeper.stdout.readline().split())
        mapped = Arena.open(ArenaTicket(pid, fd, 4096))
        keeper.kill()
    with pytest.raises(InfrastructureError, match=f"pid {pid}\\) is gone"):
        Arena.open(ArenaTicket(pid, fd, 4096))
    assert bytes(mapped.buffer[:5]) == b"state"  # A process that maps it can still read.
    mapped.close()
    assert not [name for name in set(os.listdir("/dev/shm")) - files if "arena" in name]


def test_close_gives_the_memory_back_and_keeps_views_valid() -> None:
    before = num_arenas()
    arena = Arena.create(8)
    opened = Arena.open(arena.ticket)
    arena.buffer[:] = b"12345678"
    view = opened.buffer[2:4]
    for each in (arena, opened, arena):
        each.close()
    assert bytes(view) == b"34"
    with pytest.raises(ValueError, match="closed"):
        _ = opened.buffer
    del view
    assert num_arenas() == before


def test_a_forgotten_arena_is_freed_too() -> None:
    before = num_arenas()
    arena = Arena.create(8)
    Arena.open(arena.ticket)
    del arena
    assert num_arenas() == before


def test_neither_side_can_shrink_it() -> None:
    arena = Arena.create(8192)
    with pytest.raises(PermissionError):
        os.truncate(f"/proc/self/fd/{arena.ticket.fd}", 0)
    arena.close()


def test_another_file_under_the_same_number_is_refused(tmp_path: Path) -> None:
    with open(f"{tmp_path}/file", "wb+") as file:
        file.write(bytes(64))
        file.flush()
        with pytest.raises(InfrastructureError, match="another process has its number"):
            Arena.open(ArenaTicket(os.getpid(), file.fileno(), 64))
    arena = Arena.create(64)
    with pytest.raises(InfrastructureError, match="no snapshot buffer of 65 bytes"):
        Arena.open(ArenaTicket(os.getpid(), arena.ticket.fd, 65))
    arena.close()


def test_an_empty_shard_has_an_empty_buffer() -> None:
    empty = Arena.create(0)
    assert len(empty.buffer) == len(Arena.open(empty.ticket).buffer) == 0
    empty.close()


def test_more_than_the_node_has_is_refused_before_it_is_taken() -> None:
    with pytest.raises(InfrastructureError, match=f"no memory for a snapshot buffer of {1 << 62} bytes: \\d+ are"):
        Arena.create(1 << 62)


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.current").write_text("900\n")
    monkeypatch.setattr("elastictrain.checkpoint.arena._CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000\n")
    Arena.create(100).close()
    with pytest.raises(InfrastructureError, match="buffer of 101 bytes: 100 are available"):
        Arena.create(101)
    (tmp_path / "memory.max").write_text("max\n")
    Arena.create(101).close()
