"""The ledger that forgets is the ledger: whatever is told, in whatever order, however little it keeps."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings
from test_ledger import journals, run_started, steps_as_one, times

from elastictrain.events import Event, RunStarted
from elastictrain.tracking.ledger import goodput
from elastictrain.tracking.running_ledger import RunningLedger


@settings(deadline=None)
@given(run_started, journals, st.integers(2, 6), st.none() | times, st.integers(1, 40))
def test_the_ledger_that_forgets_is_the_ledger(
    start: RunStarted, journal: list[Event], most_steps: int, now: float | None, every: int
) -> None:
    told = [start, *journal]
    running = RunningLedger(lambda: told, most_steps)
    for number, event in enumerate(told, start=1):
        running.add(event)
        if number % every == 0 or number == len(told):
            whole, mine = goodput(told[:number], now), running.goodput(now)
            assert mine.run_us.keys() == whole.run_us.keys()
            for counted, expected in ((mine.run_us, whole.run_us), (mine.workers_us, whole.workers_us)):
                assert steps_as_one(counted) == steps_as_one(expected)
