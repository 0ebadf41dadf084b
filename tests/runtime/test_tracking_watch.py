"""What a user hears of an MLflow that takes nothing for a while: once when it begins, and once when it is over."""

from __future__ import annotations

from elastictrain.events import Event, Warned
from elastictrain.runtime.tracker import TrackingWatch
from elastictrain.tracking.deliver import Delivery

FINE, SLOW = Delivery(done=True), Delivery(done=False)
DEAD = Delivery(done=False, problem="MLflow at http://127.0.0.1:1 takes nothing: Connection refused")


def told(*deliveries: Delivery, last: Delivery = FINE) -> list[str]:
    events: list[Event] = []
    watch = TrackingWatch(events.append)
    for delivery in deliveries:
        watch.hear(delivery)
    watch.hear(last, over=True)
    assert all(isinstance(event, Warned) and event.topic == "tracking" for event in events)
    return [event.message for event in events if isinstance(event, Warned)]


def test_an_outage_is_told_when_it_begins_and_when_it_is_over() -> None:
    began, over = told(FINE, DEAD, DEAD, SLOW, DEAD, FINE, FINE)
    assert began.startswith(f"{DEAD.problem} (since ")
    assert "Training goes on" in began
    assert over.startswith("MLflow answers again after ")


def test_each_outage_is_told() -> None:
    assert len(told(DEAD, FINE, DEAD, FINE)) == 4


def test_one_that_lasts_is_told_once() -> None:
    assert len(told(DEAD, DEAD, last=DEAD)) == 1
    assert len(told(FINE, last=DEAD)) == 1


def test_being_behind_counts_only_at_the_end() -> None:
    assert told(SLOW, SLOW) == []
    [behind] = told(SLOW, last=SLOW)
    assert behind.startswith("MLflow is slow (since ")
