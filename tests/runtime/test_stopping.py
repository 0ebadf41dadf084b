"""A terminal that is closed asks for a clean stop as Ctrl-C does; `nohup` keeps it from being heard."""

from __future__ import annotations

import os
import signal

import pytest

from elastictrain.runtime.stopping import stopping


def test_a_closed_terminal_stops_what_has_not_begun_to_train() -> None:
    before = signal.getsignal(signal.SIGHUP)
    with stopping(), pytest.raises(KeyboardInterrupt, match="SIGHUP received"):
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == before


def test_a_closed_terminal_has_the_run_stop_itself() -> None:
    heard: list[str] = []
    with stopping() as stop:
        stop.told = heard.append
        os.kill(os.getpid(), signal.SIGHUP)
    assert heard == ["SIGHUP received"]


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
