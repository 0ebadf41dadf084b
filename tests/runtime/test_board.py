"""The board's record outlives its writer: it is memory that a keeper owns."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import pytest

from elastictrain.checkpoint.arena import Arena
from elastictrain.runtime.board import BOARD_BYTES, PHASES, Board

WRITE_AND_DIE = """
import os, sys
from elastictrain.checkpoint.arena import Arena, ArenaTicket
from elastictrain.runtime.board import Board
Board(Arena.open(ArenaTicket(*map(int, sys.argv[1:]))).buffer).write(3, 61, "backward")
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("phase", PHASES)
def test_what_is_written_is_read(phase: str) -> None:
    board = Board(memoryview(bytearray(BOARD_BYTES)))
    board.write(2, 40, phase)
    progress = board.read()
    assert (progress.generation, progress.step, progress.phase) == (2, 40, phase)
    assert abs(progress.at - time.time()) < 60


def test_a_rank_that_wrote_nothing_is_in_no_generation() -> None:
    board = Board(memoryview(bytearray(BOARD_BYTES)))
    assert (board.read().generation, board.read().silent_s) == (-1, math.inf)
    board.write(0, 0, "forming")
    assert (board.read().generation, board.read().silent_s < 60) == (0, True)


def test_memory_stays_told_until_it_is_told_anew() -> None:
    board = Board(memoryview(bytearray(BOARD_BYTES)))
    assert board.read().memory_bytes == 0
    board.write_memory(5_000_000_000)
    board.write(2, 41, "forward")
    board.begin_wait(1)
    assert board.read().memory_bytes == 5_000_000_000


def test_waits_for_peers_are_counted() -> None:
    board = Board(memoryview(bytearray(BOARD_BYTES)))
    board.write(2, 40, "backward")
    board.begin_wait(1)
    assert (board.read().marks, board.read().waits, board.read().waiting) == (1, 1, True)
    time.sleep(0.02)
    board.end_wait()
    board.begin_wait(1)
    board.end_wait()
    progress = board.read()
    assert (progress.waits, progress.waiting) == (2, False)
    assert 0.02 <= progress.blocked_s == board.blocked_s < 10
    assert 0 <= progress.silent_s < 10
    board.write(3, 41, "data")
    assert (board.read().marks, board.blocked_s) == (1, 0.0)


ALL_REDUCE, ALL_GATHER = 1, 4


def test_a_step_that_goes_otherwise_than_the_one_before_shows() -> None:
    board = Board(memoryview(bytearray(BOARD_BYTES)))

    def step(number: int, *kinds: int) -> list[bool]:
        strayed = []
        for phase, kind in zip(("backward", "update", "update", "update"), kinds):
            board.write(2, number, phase)
            board.begin_wait(kind)
            strayed.append(board.read().strayed)
            board.end_wait()
        return strayed

    usual = (ALL_REDUCE, ALL_REDUCE, ALL_GATHER)
    assert step(40, *usual) == [False, False, False], "nothing is known of a first step"
    assert step(41, *usual) == [False, False, False]
    assert step(42, ALL_REDUCE, ALL_GATHER, ALL_GATHER) == [False, True, True], "it left one out, and stays marked"
    assert step(43, ALL_REDUCE, ALL_GATHER) == [False, False]
    assert step(44, ALL_REDUCE, ALL_GATHER, ALL_GATHER) == [False, False, True], "one more than before"
    board.write(3, 45, "forming")
    assert step(45, ALL_GATHER) == [False], "another generation, another group"


def test_a_killed_writer_leaves_its_last_word() -> None:
    arena = Arena.create(BOARD_BYTES)
    ticket = arena.ticket
    arguments = [str(ticket.pid), str(ticket.fd), str(ticket.num_bytes)]
    subprocess.run([sys.executable, "-c", WRITE_AND_DIE, *arguments], check=False)
    progress = Board(arena.buffer).read()
    assert (progress.generation, progress.step, progress.phase) == (3, 61, "backward")
