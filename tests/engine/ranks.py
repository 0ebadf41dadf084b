"""Ranks as real processes, for tests of the engine.

A fork server imports torch and DeepSpeed once; each rank is a fork of it, there in milliseconds. A program is a
top-level function `program(me: Rank, *args) -> result`; what it raises fails the test with its traceback.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

PATIENCE_S = 120.0
"""Longest wait for a program on a busy machine; a failing test ends sooner, by its own assertions."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "elastictrain.engine.warm",
        "elastictrain.workloads.language_model",
        "deepspeed.runtime.bf16_optimizer",
        # what the first engine of a process imports on its way
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "torch._inductor.compile_fx",
    ]
)
# The fork server inherits them: one thread a rank, and what `prepare_process` would set before importing deepspeed.
os.environ["OMP_NUM_THREADS"] = "1"
# Asking for GPUs must not start CUDA in a process that is forked from.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@dataclass
class Rank:
    """One process's side: who it is, and its line to the test."""

    index: int
    addresses: list[str]
    """Everyone's rendezvous."""
    line: Connection

    def group(self, generation: int, members: Sequence[int], **options: Any) -> Any:
        """A group of these processes, not formed yet; its rank 0 is the first of them."""
        from elastictrain.engine.group import RankGroup

        address = self.addresses[members[0]]
        return RankGroup(address, generation, members.index(self.index), len(members), **options)

    def say(self, message: Any) -> None:
        """Tell the test something."""
        self.line.send(("said", message))

    def hear(self) -> Any:
        """Wait for what the test says."""
        return self.line.recv()

    def meet(self) -> None:
        """Wait until all ranks are here; only under `run_team`."""
        self.say("here")
        assert self.hear() == "all here"


class Team:
    """The test's side: the processes, what they said, what they returned."""

    def __init__(self, processes: list[Any], lines: list[Connection]) -> None:
        self.processes = processes
        self._lines = lines

    def tell(self, rank: int, message: Any) -> None:
        """Send a message that `Rank.hear` returns."""
        self._lines[rank].send(message)

    def said(self, rank: int) -> Any:
        """Wait for the rank's next message."""
        kind, value = self._receive(rank)
        assert kind == "said", f"rank {rank} {kind} {value!r} without saying anything"
        return value

    def result(self, rank: int) -> Any:
        """Wait for the rank's program to return."""
        kind, value = self._receive(rank)
        assert kind == "returned", f"rank {rank} {kind} {value!r} instead of returning"
        return value

    def _receive(self, rank: int) -> tuple[str, Any]:
        line, process = self._lines[rank], self.processes[rank]
        if not wait([line, process.sentinel], PATIENCE_S):
            raise AssertionError(f"rank {rank} said nothing for {PATIENCE_S} s")
        if not line.poll():
            raise AssertionError(f"rank {rank} died: exit code {process.exitcode}")
        kind, value = line.recv()
        if kind == "raised":
            raise AssertionError(f"rank {rank} raised:\n{value}")
        return kind, value


@contextmanager
def team(num_ranks: int, program: Callable[..., Any], *args: Any) -> Iterator[Team]:
    """Run the program in this many processes; none is left afterwards."""
    pipes = [_CONTEXT.Pipe() for _ in range(num_ranks)]
    processes = [
        _CONTEXT.Process(target=_run, args=(rank, theirs, program, args), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    members = Team(processes, [ours for ours, _ in pipes])
    try:
        for process, (_, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()
        addresses = [members.said(rank) for rank in range(num_ranks)]
        for rank in range(num_ranks):
            members.tell(rank, addresses)
        yield members
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_team(num_ranks: int, program: Callable[..., Any], *args: Any) -> list[Any]:
    """Run the program in this many processes and return what they return."""
    with team(num_ranks, program, *args) as members:
        while True:
            messages = [members._receive(rank) for rank in range(num_ranks)]
            if all(kind == "returned" for kind, _ in messages):
                return [value for _, value in messages]
            assert messages == [("said", "here")] * num_ranks
            for rank in range(num_ranks):
                members.tell(rank, "all here")


def num_files() -> int:
    """Open files of this process."""
    return len(os.listdir("/dev/fd"))


def _run(index: int, line: Connection, program: Callable[..., Any], args: tuple[Any, ...]) -> None:
    from elastictrain.engine.group import Rendezvous

    os.environ["NCCL_HOSTID"] = f"rank{index}"  # where ranks share a GPU, nccl must take it for one of another host's
    gc.freeze()  # as `warm` does: DeepSpeed collects garbage while it builds
    try:
        rendezvous = Rendezvous.serve("127.0.0.1")
        line.send(("said", rendezvous.address))
        me = Rank(index, line.recv(), line)
        line.send(("returned", program(me, *args)))
    except BaseException:
        line.send(("raised", traceback.format_exc()))
        raise
