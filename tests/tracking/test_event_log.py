"""Events that are packed come out as they went in."""

from __future__ import annotations

from dataclasses import replace

from example_events import Story, full_story

from elastictrain.events import StepCommitted, Waits
from elastictrain.tracking.event_log import EventLog, View
from elastictrain.tracking.exact_json import dumps
from elastictrain.tracking.report import build_report
from elastictrain.tracking.step_times import StepTime, times

WAITS = Waits(0.01, 0.02, 0.03)


def packable(gauges: dict[str, float]) -> list[object]:
    """A whole story, its steps with all that steps of today tell."""
    told = full_story().events
    return [replace(e, waits=WAITS, gauges=gauges) if isinstance(e, StepCommitted) else e for e in told]


def test_every_event_comes_out_as_it_went_in() -> None:
    odd = Story().start().generation().steps(2).events  # they tell of no waits
    nothing_yet = [replace(odd[-1], sample_chain=chain, waits=WAITS) for chain in ("", "AB" * 32, " " * 64)]
    for gauges in ({}, {"busiest_expert": 1.5, "dropped_tokens": 0.25}):
        events = [*packable(gauges), *odd, *nothing_yet]
        log = EventLog(events)
        assert log == events
        assert [*reversed(log)] == events[::-1]
        assert (log[3:9], log[-1], len(log)) == (events[3:9], events[-1], len(events))


def test_the_times_of_packed_steps_are_those_of_the_steps() -> None:
    events = [*packable({"busiest_expert": 1.5}), *Story().start().generation().steps(2).events]
    told = [*times(events)]
    assert [*times(EventLog(events))] == told
    assert [*times(View(EventLog(events), range(9, 4, -1)))] == told[9:4:-1]
    timed, step = next((t, e) for t, e in zip(told, events) if isinstance(e, StepCommitted))
    assert timed == (*(getattr(step, name) for name in StepTime._fields[:6]), 0.01, 0.02, 0.03)


def test_the_report_of_packed_events_is_the_same() -> None:
    events = packable({"busiest_expert": 1.5})
    assert dumps(build_report(EventLog(events))) == dumps(build_report(events))


def test_a_view_copies_nothing_and_looks_like_what_it_views() -> None:
    view = View("abcdef", (4, 1, 5))
    assert (list(view), view[0], view[-2:], len(view)) == (["e", "b", "f"], "e", ("b", "f"), 3)
