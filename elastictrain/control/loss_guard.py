"""Which steps must not change the weights: a loss or gradient that is no number, or a loss far above the last (pure).

    limit = median of the last RECENT losses + spike_threshold * noise
    noise = 1.0484 * median(|loss - loss before|)        over the last WINDOW steps

The noise is a normal's standard deviation; medians, so that single outliers don't move it, and of differences, so that
the fall of the loss does not either. Steps that did not count are left out.

The limit of a step is known before the step begins, so the engine compares on the device and nobody waits for a word.
Every rank holds the same guard, fed with the mean over the global batch: all come to the same verdict. A guard made
from the recorded losses of the last WINDOW steps is the one that saw them happen, so a resume decides alike.

With fp16 a gradient overflows whenever the loss scale is too high for it: the step counts as any other whose update is
not made, and is never more than skipped, but for `max_bad_steps` of them in a row.

Cost: a sort of WINDOW floats a step, about 10 us; nothing while spikes are ignored.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from statistics import median
from typing import Literal

from elastictrain.config import BadStepAction, TrainSection
from elastictrain.events import SkipReason

WINDOW = 64
"""Steps that the noise is taken from, and all that a guard remembers."""
RECENT = 16
"""Losses that the next one is compared with; with fewer, no loss is a spike."""
LEAST_NOISE = 0.01
"""Of the median: losses that hardly differ would else make a spike of anything."""

Seen = tuple[float, bool]
"""A step's loss, and whether its update was skipped."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is wrong with a step whose update was not made, and what to do."""

    step: int
    loss: float
    limit: float
    """Above it the loss was a spike; infinite where there was none."""
    reason: SkipReason
    action: Literal["stop", "skip", "rollback"]
    message: str
    """For people: what happened, the knob, the way out."""


class LossGuard:
    """Judges step after step. `seen` holds the steps before the first, oldest first; the last WINDOW count."""

    def __init__(self, train: TrainSection, seen: Iterable[Seen] = ()) -> None:
        self._train = train
        self._seen = deque(seen, maxlen=WINDOW)

    @property
    def limit(self) -> float:
        """Above it the next step's loss is a spike; infinite while there is no telling, or spikes are ignored."""
        if self._train.on_spike == "ignore":
            return math.inf
        return spike_limit([loss for loss, skipped in self._seen if not skipped], self._train.spike_threshold)

    def judge(self, step: int, loss: float, updated: bool) -> Verdict | None:
        """Take in the next step; None when its update was made."""
        limit = self.limit
        self._seen.append((loss, not updated))
        if updated:
            return None
        reason: SkipReason = "loss" if not math.isfinite(loss) else "spike" if loss > limit else "gradient"
        action: BadStepAction = self._train.on_spike if reason == "spike" else self._train.on_bad_loss
        if self._train.dtype == "fp16" and reason == "gradient":
            # the loss scale was too high, and is lower now: that is how fp16 finds it
            action = "skip"
        in_a_row = sum(1 for _ in takewhile(lambda seen: seen[1], reversed(self._seen)))
        return _verdict(step, loss, limit, reason, action, in_a_row, self._train.max_bad_steps)


def spike_limit(losses: Sequence[float], threshold: float) -> float:
    """The highest loss that is no spike after these; infinite after fewer than RECENT."""
    if len(losses) < RECENT:
        return math.inf
    middle = median(losses[-RECENT:])
    noise = 1.0484 * median(abs(after - before) for before, after in pairwise(losses))
    return middle + threshold * max(noise, LEAST_NOISE * abs(middle))


def mean_loss(losses: Sequence[float]) -> float:
    """The mean, exactly rounded and so the same in any order; NaN or infinite when one of them is."""
    finite = all(map(math.isfinite, losses))
    return (math.fsum(losses) if finite else sum(losses)) / len(losses)


def _verdict(
    step: int, loss: float, limit: float, reason: SkipReason, action: BadStepAction, in_a_row: int, most: int
) -> Verdict:
    assert action != "ignore", "what is ignored is not skipped"
    what = {
        "loss": f"the loss of step {step} is {loss}",
        "gradient": f"the gradient of step {step} is not finite (its loss is {loss:g})",
        "spike": f"the loss of step {step} is {loss:g}, above the limit of {limit:g} for a spike",
    }[reason]
    knob = "train.on_spike" if reason == "spike" else "train.on_bad_loss"
    if in_a_row >= most:
        return Verdict(
            step, loss, limit, reason, "stop",
            f"{what}, the last of {in_a_row} bad steps in a row (train.max_bad_steps {most}). No bad step changed the "
            f"weights. Look at the data and the learning rate; to go on, submit again with a larger "
            f"train.max_bad_steps."
        )  # fmt: skip
    if action == "stop":
        what += (
            f" ({knob}: stop). The weights are those after step {step - 1}. To go on without this step's samples, "
            f"submit again with {knob}=skip or {knob}=rollback."
        )
    return Verdict(step, loss, limit, reason, action, what)
