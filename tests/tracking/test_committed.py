"""Which steps stand after roll-backs, and which checkpoints are the run's though nothing tells of them."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from example_events import Story, full_story

from elastictrain.state.manifest import Manifest, ShardEntry
from elastictrain.state.tensors import Fragment, LogicalTensor, ShardIndex
from elastictrain.tracking.committed import committed_steps, doubt, written_checkpoints


def checkpoint(story: Story, step: int) -> Manifest:
    """That of a committed step, as whoever died too early to tell of it would have written it."""
    committed = next(s for s in committed_steps(story.events).standing if s.step == step)
    index = ShardIndex((Fragment("param/w", 0, 2),))
    shard = ShardEntry("shard-00000-of-00001.safetensors", 8, hashlib.sha256(b"").hexdigest(), index)
    tensors = (LogicalTensor("param/w", (2,)),)
    return Manifest(
        "demo", step, 16 * step, committed.sample_chain, committed.loss, {"dp": 1}, {}, tensors, (shard,), 1e9
    )


def test_a_step_that_was_done_again_stands_once() -> None:
    story = Story().start().generation().steps(10).kill().recover(lost=3).steps(5)
    folded = committed_steps(story.events)
    assert [s.step for s in folded.standing] == list(range(1, story.step + 1))
    assert {s.step for s in folded.undone} == {9, 10}


def test_the_events_list_the_checkpoints_that_are_there() -> None:
    assert sorted(written_checkpoints(full_story().events)) == [101 - 1, 160, 200]


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf")])
def test_a_checkpoint_that_agrees_with_the_events_is_the_runs(loss: float | None) -> None:
    story = Story().start().generation().steps(10, loss=loss)
    found = Manifest.from_json(checkpoint(story, 7).to_json())
    assert doubt(story.events, found) == ""
    assert "has not come to step 11" in doubt(story.events, replace(found, step=11))
    assert "its loss or its samples differ" in doubt(story.events, replace(found, loss=1.0))
    assert "its loss or its samples differ" in doubt(story.events, replace(found, sample_chain="ab" * 32))
