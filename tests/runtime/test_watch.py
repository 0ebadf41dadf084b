"""A death is known at once, with its time and its cause, by a process that is no parent of it."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from elastictrain.events import Cause
from elastictrain.runtime.watch import ProcessWatch

Deaths = queue.SimpleQueue[tuple[str, float, Cause]]


@pytest.fixture
def watched() -> Iterator[tuple[ProcessWatch, Deaths]]:
    deaths: Deaths = queue.SimpleQueue()
    watch = ProcessWatch(lambda key, at, cause: deaths.put((key, at, cause)))
    yield watch, deaths
    watch.close()


def start(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", f"import os, sys; sys.stdin.read(1); {code}"], stdin=subprocess.PIPE)


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("os.kill(os.getpid(), 9)", Cause("signal", "SIGKILL")),
        ("os.kill(os.getpid(), 11)", Cause("signal", "SIGSEGV")),
        ("os._exit(3)", Cause("exit", "exit code 3")),
        ("pass", Cause("exit", "exit code 0")),
    ],
)
def test_the_cause_is_told(watched: tuple[ProcessWatch, Deaths], code: str, cause: Cause) -> None:
    watch, deaths = watched
    process = start(code)
    watch.add("worker-1", process.pid)
    before = time.time()
    process.communicate(b"x")  # goes on, and is reaped
    key, at, told = deaths.get(timeout=10)
    assert (key, told) == ("worker-1", cause)
    assert before <= at <= time.time()


def test_a_process_that_is_gone_already_is_told_too(watched: tuple[ProcessWatch, Deaths]) -> None:
    watch, deaths = watched
    process = start("pass")
    process.communicate(b"x")
    watch.add("late", process.pid)
    assert deaths.get(timeout=10)[0] == "late"


def test_many_deaths_at_once_are_told_once_each(watched: tuple[ProcessWatch, Deaths]) -> None:
    watch, deaths = watched
    processes = [start("pass") for _ in range(5)]
    for number, process in enumerate(processes):
        watch.add(str(number), process.pid)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.communicate()
    told = [deaths.get(timeout=10) for _ in processes]
    assert sorted(key for key, _, _ in told) == ["0", "1", "2", "3", "4"]
    assert {cause.message for _, _, cause in told} == {"SIGKILL"}
    assert deaths.empty()


def test_all_that_are_watched_can_be_ended(watched: tuple[ProcessWatch, Deaths]) -> None:
    watch, deaths = watched
    processes = {name: start("pass") for name in ("a", "b")}
    for name, process in processes.items():
        watch.add(name, process.pid)
    watch.kill()
    for process in processes.values():
        process.communicate()
    found = {name: cause for name, _, cause in (deaths.get(timeout=10) for _ in processes)}
    assert found == dict.fromkeys(processes, Cause("signal", "SIGKILL"))
