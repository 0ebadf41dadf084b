"""The learning rate as a pure function of the step, so that it needs no state and survives any recovery."""

from __future__ import annotations

import math

from elastictrain.config import TrainSection


def learning_rate(train: TrainSection, step: int) -> float:
    """The rate of step `step` (1 is the first): linear warm-up to the peak, then a cosine to the minimum at the last.

    Raises ValueError for a step before the first; after the last one the rate stays at the minimum.
    """
    if step < 1:
        raise ValueError(f"step {step}: the first step is 1")
    warmup_steps = min(train.warmup_steps, train.steps)
    if step <= warmup_steps:
        return train.learning_rate * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, train.steps - warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return train.min_learning_rate + (train.learning_rate - train.min_learning_rate) * cosine
