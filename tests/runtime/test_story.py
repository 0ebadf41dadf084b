"""What happened is told in its order, also where news of the last steps comes after that of the failure."""

from __future__ import annotations

from elastictrain.control.vocabulary import Form, RestorePoint
from elastictrain.data.order import EMPTY_CHAIN
from elastictrain.events import Cause, Event, FailureDetected, Member, Recovered, StepCommitted
from elastictrain.plan.auto import Choice
from elastictrain.plan.layout import Layout
from elastictrain.runtime.commits import CommitCollector
from elastictrain.runtime.protocol import RestoreFrom, StepRecord, pack_records
from elastictrain.runtime.story import Story
from elastictrain.state.tensors import ShardHeader

LAYOUT = Layout(1, 1, 1, 1)


def held(generation: int, step: int) -> ShardHeader:
    note = pack_records(
        [StepRecord(step, ((0, 1.0, (step,)),), 10, 100.0 + step, 100.5 + step, 0.1, 1.0, 0.0, 0.0, 0.0)]
    )
    return ShardHeader(generation, step, 0, 1, "", {}, note)


def begin(story: Story, generation: int, step: int) -> None:
    story.restore(RestoreFrom("memory" if step else "fresh", step), LAYOUT.to_json() if step else None)
    order = Form(generation, ("a",), RestorePoint(story.restored.source, step), "", Choice(LAYOUT))
    story.begin(order, LAYOUT.to_json(), (Member(0, "a", 1, "n"),), {})


def test_a_late_first_step_heals_nothing_of_its_own_generation() -> None:
    told: list[Event] = []
    story = Story(told.append, CommitCollector(0, EMPTY_CHAIN), RestoreFrom("fresh", 0), None)
    begin(story, 0, 0)
    story.fail("user_error", Cause("exception", "no"), generation=0)
    story.commit(held(0, 1))
    begin(story, 1, 1)
    story.fail("user_error", Cause("exception", "no"), generation=1)
    begin(story, 2, 1)
    story.commit(held(2, 2))
    kinds = [type(event) for event in told if isinstance(event, FailureDetected | StepCommitted | Recovered)]
    assert kinds == [FailureDetected, StepCommitted, FailureDetected, StepCommitted, Recovered]
    [recovered] = [event for event in told if isinstance(event, Recovered)]
    assert (recovered.generation, recovered.first_step, recovered.lost_steps) == (2, 2, 0)
