"""A worker that the kernel killed for want of memory is told from one that somebody killed."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastictrain.events import Cause
from elastictrain.runtime.oom_kills import OomKills

KILLED = Cause("signal", "SIGKILL")
MEMORY = Path("/sys/fs/cgroup/memory")


def write(counter: Path, kills: int) -> Path:
    counter.write_text(f"low 0\nhigh 0\nmax 7\noom {kills}\noom_kill {kills}\noom_group_kill 0\n")
    return counter


def test_one_kill_of_the_kernels_explains_one_death(tmp_path: Path) -> None:
    counter = write(tmp_path / "memory.events", 3)
    kills = OomKills((tmp_path / "missing", counter))
    assert kills.explain(KILLED) == KILLED
    write(counter, 5)
    told = [kills.explain(KILLED) for _ in range(3)]
    assert [cause.kind for cause in told] == ["oom", "oom", "signal"]
    assert "OOM killer" in told[0].message


def test_it_explains_neither_other_deaths_nor_later_ones(tmp_path: Path) -> None:
    counter = write(tmp_path / "memory.events", 0)
    kills = OomKills((counter,))
    write(counter, 1)
    assert kills.explain(Cause("signal", "SIGSEGV")) == Cause("signal", "SIGSEGV")
    kills.look()
    assert kills.explain(KILLED) == KILLED


def test_without_any_counter_nothing_is_claimed(tmp_path: Path) -> None:
    assert OomKills((tmp_path / "missing",)).explain(KILLED) == KILLED


def test_this_machine_has_a_counter() -> None:
    assert OomKills().explain(KILLED) == KILLED


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup (v1) of 32 MiB; skips where this user may not make one."""
    folder = MEMORY / f"elastictrain-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(32 << 20))
    except OSError:
        pytest.skip("may not make a memory cgroup")
    yield folder
    folder.rmdir()


def test_a_real_kill_is_counted(small_cgroup: Path) -> None:
    kills = OomKills((small_cgroup / "memory.oom_control",))
    grow = f"open({str(small_cgroup / 'cgroup.procs')!r}, 'w').write('0'); bytearray(256 << 20)"
    done = subprocess.run([sys.executable, "-c", grow], check=False)
    assert done.returncode == -9
    assert kills.explain(KILLED).kind == "oom"
    assert kills.explain(KILLED) == KILLED
