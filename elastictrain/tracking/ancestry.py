"""The family tree of a run (pure): attempts, their generations, and the checkpoints of each with what they came from.

One JSON-able dict, folded from the events; docs/tracking.md documents it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import isfinite
from typing import Any

from elastictrain.events import Event, GenerationStarted, RunStarted, StepCommitted
from elastictrain.tracking.attempts import Attempt, split_attempts
from elastictrain.tracking.committed import committed_steps
from elastictrain.tracking.family import Family, Kin
from elastictrain.tracking.redact import redact


def ancestry(events: Sequence[Event]) -> dict[str, Any]:
    """The tree of these events, in journal order; raises ValueError when they hold no start of a run."""
    attempts = split_attempts(events)
    if not attempts:
        raise ValueError("the events hold no RunStarted: there is no run to draw")
    begun_at = attempts[0].begun_at
    family = Family(events)
    start = attempts[-1].events[0]
    assert isinstance(start, RunStarted)
    return {
        "run": start.run,
        "best": redact(family.best),
        "last": redact(family.last),
        "attempts": [_attempt(attempt, begun_at, family, events) for attempt in attempts],
    }


def _attempt(attempt: Attempt, begun_at: float, family: Family, events: Sequence[Event]) -> dict[str, Any]:
    start, ending = attempt.events[0], attempt.ending
    assert isinstance(start, RunStarted)
    generations = [e for e in attempt.events if isinstance(e, GenerationStarted)]
    return {
        "attempt": start.attempt,
        "status": ending.status if ending else None,
        "started_s": start.at - begun_at,
        "ended_s": attempt.ended_at - begun_at,
        "generations": _generations(generations, family, events),
    }


def _generations(
    generations: Sequence[GenerationStarted], family: Family, events: Sequence[Event]
) -> list[dict[str, Any]]:
    done: dict[int, int] = defaultdict(int)
    standing: dict[int, int] = defaultdict(int)
    for event in events:
        if isinstance(event, StepCommitted):
            done[event.generation] = max(done[event.generation], event.step)
    for step in committed_steps(events).standing:
        standing[step.generation] += 1
    return [
        {
            "index": g.index,
            "cause": redact(g.cause),
            "world_size": g.world_size,
            "first_step": g.first_step,
            "last_step": done[g.index] or None,
            "standing_steps": standing[g.index],
            "source": g.source,
            "restored_from": _restored_from(g, family),
            "origin": _origin(g, family),
            "continuation": g.continuation,
            "checkpoints": [_checkpoint(k, family) for k in family.members.values() if k.generation == g.index],
        }
        for g in generations
    ]


def _restored_from(generation: GenerationStarted, family: Family) -> str | None:
    """URI of the checkpoint that a generation began from; None for memory and for a fresh start."""
    step = generation.first_step - 1
    found = (redact(k.written.uri) for k in family.members.values() if k.written.step == step)
    return next(found, None) if generation.source == "durable" else None


def _origin(generation: GenerationStarted, family: Family) -> str | None:
    """URI of the checkpoint of another run that this generation began with a copy of; None for all others."""
    uri = _restored_from(generation, family)
    found = (redact(k.written.origin) for k in family.members.values() if redact(k.written.uri) == uri)
    return next(found, None) or None


def _checkpoint(kin: Kin, family: Family) -> dict[str, Any]:
    event, evaluated = kin.written, kin.evaluated
    return {
        "step": event.step,
        "uri": redact(event.uri),
        "sha256": event.sha256,
        "parent": redact(kin.parent) or None,
        "samples": event.samples,
        "loss": event.loss if isfinite(event.loss) else None,
        "bits_per_byte": evaluated.bits_per_byte if evaluated else None,
        "removed": kin.removed,
        "rejected": redact(kin.rejected) or None,
        "best": event.uri == family.best,
        "last": event.uri == family.last,
    }
