"""Parents of checkpoints, and which are best and last, over any order of events."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import given

from elastictrain.events import (
    CheckpointRejected,
    CheckpointRemoved,
    CheckpointWritten,
    Evaluated,
    Event,
    GenerationStarted,
)
from elastictrain.tracking.family import Family

steps = st.integers(1, 9)


def written(step: int, loss: float = 1.0) -> CheckpointWritten:
    return CheckpointWritten(0.0, step, f"step-{step}", 1, "", 0.1, step, "", loss, {})


def began(first_step: int) -> GenerationStarted:
    return GenerationStarted(0.0, 1, {}, 2, first_step, "resume", "durable", "bit_exact", ())


def evaluated(step: int, loss: float) -> Evaluated:
    return Evaluated(0.0, step, loss, 1.0, 1.0, 1, "")


events = st.one_of(
    st.builds(written, steps, st.floats()),
    st.builds(began, steps),
    st.builds(evaluated, steps, st.floats()),
    st.builds(lambda step: CheckpointRemoved(0.0, step, f"step-{step}"), steps),
    st.builds(lambda step: CheckpointRejected(0.0, step, f"step-{step}", "bad"), steps),
)


@given(st.lists(events, max_size=40))
def test_parents_are_earlier_steps_and_the_best_and_last_are_usable(told: list[Event]) -> None:
    family = Family(told)
    for kin in family.members.values():
        if kin.parent:
            assert family.members[kin.parent].written.step < kin.written.step
    for uri in (family.best, family.last):
        assert uri == "" or family.members[uri].usable
    assert (family.best == "") == (not any(kin.usable for kin in family.members.values()))


@given(st.lists(events, max_size=40))
def test_what_changed_is_told(told: list[Event]) -> None:
    family, seen = Family(), dict[str, object]()
    for event in told:
        before = family.last
        changed = family.add(event)
        seen |= {uri: family.members[uri] for uri in changed}
        assert changed or family.last == before
    assert seen == family.members


def test_a_roll_back_begins_another_branch() -> None:
    family = Family([written(2), written(4), written(6), began(5), written(7), began(3), written(5)])
    parents = {kin.written.step: kin.parent for kin in family.members.values()}
    assert parents == {2: "", 4: "step-2", 6: "step-4", 7: "step-4", 5: "step-2"}
    assert family.last == "step-5"


def test_an_evaluation_counts_more_than_a_training_loss() -> None:
    family = Family([written(1, 0.5), written(2, 0.9), evaluated(2, 3.0)])
    assert family.best == "step-2"
    family.add(CheckpointRemoved(0.0, 2, "step-2"))
    assert (family.best, family.last) == ("step-1", "step-1")


def test_a_loss_that_is_no_number_is_the_worst() -> None:
    assert Family([written(1, float("nan")), written(2, 9.0)]).best == "step-2"


def test_a_checkpoint_written_anew_is_in_its_new_place() -> None:
    family = Family([written(2), written(4, 1.0), began(3), written(3), written(4, 2.0)])
    assert family.members["step-4"].parent == "step-3"
    assert family.members["step-4"].written == replace(written(4), loss=2.0)
