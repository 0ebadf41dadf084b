"""Who hears nothing of anybody in charge ends, after its patience and not before."""

from __future__ import annotations

import threading
import time

from elastictrain.runtime.lifeline import Lifeline

PATIENCE_S = 10.0


def test_silence_ends_it_and_only_after_the_patience() -> None:
    ended = threading.Event()
    begun = time.monotonic()
    lifeline = Lifeline(0.2, ended.set)
    lifeline.hear()
    assert ended.wait(PATIENCE_S)
    assert time.monotonic() - begun >= 0.2
    assert lifeline.silent_s >= 0.2


def test_hearing_of_somebody_prolongs_it() -> None:
    ended: list[float] = []
    over = threading.Event()

    def end() -> None:
        ended.append(lifeline.silent_s)
        over.set()

    lifeline = Lifeline(0.3, end)
    until = time.monotonic() + 0.6
    while time.monotonic() < until and not over.is_set():
        lifeline.hear()
        over.wait(0.01)
    assert over.wait(PATIENCE_S)
    assert ended[0] >= 0.3, "counted from the last word"


def test_nothing_ends_while_there_is_work_for_somebody() -> None:
    ended = threading.Event()
    lifeline = Lifeline(0.1, ended.set)
    with lifeline.busy():
        assert not ended.wait(0.4)
    assert ended.wait(PATIENCE_S)


def test_another_patience_counts_from_now() -> None:
    ended = threading.Event()
    lifeline = Lifeline(3600.0, ended.set)
    lifeline.extend(0.05)
    assert ended.wait(PATIENCE_S)
