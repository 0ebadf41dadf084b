"""Each bucket of the ledger, on runs whose every second is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from example_events import START_AT, Story, full_story

from elastictrain.events import CheckpointWritten, SlotsHeld, StepCommitted, Waits
from elastictrain.tracking.html import render_html
from elastictrain.tracking.ledger import BUCKETS, Goodput, goodput, over_time, stalls, total
from elastictrain.tracking.report import build_report

TOLERANCE_S = 2e-6
"""Unix times are kept to a quarter of a microsecond."""


def expect(ledger: Goodput, **seconds: float) -> None:
    """These buckets hold these seconds, all others none."""
    assert ledger.seconds == pytest.approx(dict.fromkeys(BUCKETS, 0.0) | seconds, abs=TOLERANCE_S)
    assert sum(ledger.seconds.values()) == pytest.approx(ledger.wall_s, abs=TOLERANCE_S)


def quiet(story: Story) -> Story:
    """Without waits and stalls, for plain arithmetic."""
    story.events = [
        replace(e, data_wait_s=0.0, snapshot_stall_s=0.0, at=e.finished_at) if isinstance(e, StepCommitted) else e
        for e in story.events
    ]
    return story


def test_a_run_without_failures() -> None:
    story = quiet(Story().start(startup_s=6).generation().steps(10, step_s=0.5).evaluate(2).end(shutdown_s=1))
    ledger = goodput(story.events)
    expect(ledger, startup=6, compute=5, idle=9 * 0.01, evaluation=2.01, shutdown=1)
    assert ledger.ratio == pytest.approx(5 / ledger.wall_s)


def test_waits_and_stalls_are_not_compute() -> None:
    ledger = goodput(Story().start(6).generation().steps(10, step_s=0.5).events)
    # 0.004 s of data wait and 0.002 s of stall a step; the last step's commit comes 0.02 s after it
    expect(ledger, startup=6, compute=4.94, data_wait=0.04, snapshot_stall=0.02, idle=9 * 0.01 + 0.02)


def test_waiting_for_peers_is_productive_and_no_compute() -> None:
    story = Story().start(6).generation().steps(10, step_s=0.5)
    waits = Waits(data_s=0.002, peers_s=0.2, snapshot_s=0.001)
    story.events = [replace(e, waits=waits) if isinstance(e, StepCommitted) else e for e in story.events]
    ledger = goodput(story.events)
    expect(ledger, startup=6, compute=2.97, communication=2, data_wait=0.02, snapshot_stall=0.01, idle=0.11)
    assert ledger.productive_s == pytest.approx(4.97, abs=TOLERANCE_S)
    assert ledger.ratio == pytest.approx(4.97 / ledger.wall_s, abs=1e-6)


def test_waits_longer_than_the_step_leave_no_compute_and_take_nothing_else() -> None:
    story = quiet(Story().start(6).generation().steps(1, step_s=0.5))
    waits = Waits(data_s=0.3, peers_s=0.4, snapshot_s=9.0)
    story.events = [replace(e, waits=waits) if isinstance(e, StepCommitted) else e for e in story.events]
    expect(goodput(story.events), startup=6, data_wait=0.3, snapshot_stall=0.2)


def resized() -> Story:
    """Two steps of two workers, then two of four."""
    story = Story().start(6).generation(world_size=2).steps(2).wait(0.7)
    return quiet(story.generation(world_size=4, cause="resize").wait(0.1).steps(2))


def test_a_change_of_size_without_a_failure_is_a_resize() -> None:
    expect(goodput(resized().events), startup=6, compute=2, resize=0.81, idle=0.02)


def test_the_run_has_as_many_workers_as_its_newest_generation_has_ranks() -> None:
    workers = goodput(resized().events).worker_seconds
    used = {bucket: seconds for bucket, seconds in workers.items() if seconds}
    expected = {"startup": 2 * 6, "compute": 2 * 1 + 4 * 1, "resize": 2 * 0.71 + 4 * 0.1, "idle": 2 * 0.01 + 4 * 0.01}
    assert used == pytest.approx(expected, abs=4 * TOLERANCE_S)


def test_parts_of_the_time_add_up_to_the_whole() -> None:
    events = full_story().events
    parts = over_time(events, 37)
    assert len(parts) == 37
    together, whole = total(parts), goodput(events)
    assert sum(together.run_us.values()) == sum(whole.run_us.values())
    assert together.seconds == pytest.approx(whole.seconds, abs=1e-3)
    assert together.worker_seconds == pytest.approx(whole.worker_seconds, abs=1e-3)
    assert max(p.wall_s for p in parts) - min(p.wall_s for p in parts) < TOLERANCE_S


def test_a_kill_costs_the_step_in_flight_detection_and_recovery() -> None:
    story = Story().start(6).generation().steps(4, step_s=0.5)
    story.kill(partial_s=0.2, detect_s=0.05).recover(recovery_s=0.4, step_s=0.5).steps(2, step_s=0.5)
    # in flight: from the end of step 4, 0.01 s before step 5 began
    expect(goodput(quiet(story).events), startup=6, compute=3.5, lost=0.21, detection=0.05, recovery=0.4, idle=5 * 0.01)


def test_committed_steps_that_are_rolled_back_are_lost() -> None:
    story = Story().start(6).generation().steps(10, step_s=0.5)
    story.kill(partial_s=0.2, detect_s=0.05).recover(recovery_s=0.4, step_s=0.5, lost=4)
    ledger = goodput(quiet(story).events)
    assert ledger.seconds["compute"] == pytest.approx(8 * 0.5, abs=TOLERANCE_S)
    assert ledger.seconds["lost"] == pytest.approx(3 * 0.5 + 0.21, abs=TOLERANCE_S)


def test_a_resume_from_a_checkpoint_turns_later_steps_into_lost_and_the_gap_into_down() -> None:
    story = Story().start(6).generation().steps(10, step_s=0.5).wait(30)
    story.start(4).generation(first_step=6, cause="resume").steps(1, step_s=0.5)
    ledger = goodput(quiet(story).events)
    # nobody knows of the run from the last commit to the next attempt
    expect(ledger, startup=10, compute=3, lost=2.5, down=30.01, idle=9 * 0.01)


def test_steps_that_the_next_driver_tells_of_count_where_they_were_done() -> None:
    story = Story().start(6).generation().steps(10, step_s=0.5).inherit(down_s=30, untold=2, startup_s=4)
    ledger = goodput(quiet(story).events)
    # down from the end of the last step that was done; the driver's death costs nothing beside that
    expect(ledger, startup=10, compute=13 * 0.5, down=30.01, idle=11 * 0.01 + 0.01)


def test_a_failure_during_a_recovery_prolongs_it() -> None:
    story = Story().start(6).generation().steps(2, step_s=0.5).kill(partial_s=0.2, detect_s=0.05)
    story.wait(0.3).kill(partial_s=0.0, detect_s=0.1).recover(recovery_s=0.4, step_s=0.5)
    ledger = goodput(quiet(story).events)
    assert ledger.seconds["detection"] == pytest.approx(0.15, abs=TOLERANCE_S)
    assert ledger.seconds["recovery"] == pytest.approx(0.7, abs=TOLERANCE_S)


def test_a_run_that_gives_up_shuts_down_after_the_last_failure() -> None:
    story = Story().start(6).generation().steps(2, step_s=0.5).bug().end("failed", shutdown_s=3)
    expect(goodput(quiet(story).events), startup=6, compute=1, idle=0.01, lost=0.11, detection=0.01, shutdown=3)


def test_training_that_stood_still_for_a_checkpoint() -> None:
    """In the step after the one that is written ranks wait for its copies."""
    story = Story().start(6).generation().steps(3, step_s=0.5)
    story.tell(CheckpointWritten(story.clock, 2, "uri", 1, "", 0.4, 32, "", 2.0, {"dp": 2}))
    ledger = goodput(story.events)
    expect(ledger, startup=6, compute=1.482, data_wait=0.012, snapshot_stall=0.004, checkpoint_stall=0.002, idle=0.04)
    assert stalls(story.events, {2}) == {2: 0.002}


def test_an_attempt_that_finds_the_run_complete_is_startup() -> None:
    expect(goodput(Story().start(2).end(shutdown_s=0).events), startup=2)


def test_now_prolongs_a_run_that_goes_on_and_none_that_has_ended() -> None:
    going = Story().start(6).generation().steps(1)
    assert goodput(going.events, START_AT + 100).wall_s == 100
    assert goodput(going.end().events, START_AT + 100).wall_s < 10


def test_no_events_no_time() -> None:
    ledger = goodput([])
    assert (ledger.wall_s, ledger.ratio) == (0.0, 0.0)


def test_the_whole_story_adds_up() -> None:
    ledger = goodput(full_story().events)
    assert sum(ledger.seconds.values()) == pytest.approx(ledger.wall_s, abs=1e-6)


def test_a_slot_that_no_rank_works_in_is_paid_for_and_in_a_bucket_of_its_own() -> None:
    """Two ranks and three slots; the driver dies; then two slots, of which a shrink leaves one empty."""
    story = Story(overrides=("cluster.worker_cost_per_hour=3600",)).start(6)
    story.tell(SlotsHeld(story.clock - 1, 3))
    story.generation().steps(4, step_s=0.5).wait(10).start(4)
    story.tell(SlotsHeld(story.clock, 2))
    story.generation(first_step=5, cause="resume").steps(2, step_s=1)
    story.generation(world_size=1).steps(1, step_s=2).end(shutdown_s=0.5)
    ledger = goodput(quiet(story).events)
    assert ledger.worker_seconds["spare"] == pytest.approx(1 + 3 * 0.51 + 0.5 + 2.01 + 0.5)
    assert ledger.seconds["spare"] == 0
    report = build_report(story.events)
    paid_s = report["worker_seconds"]["total"] - report["worker_seconds"]["down"]
    assert report["cost"]["total"] == pytest.approx(paid_s)
    assert "slots that were held, and no rank worked in" in render_html(report)
