"""The loss scale of fp16 as a part of the state, so that a recovery goes on with the same one.

DeepSpeed halves it when a gradient overflows (the second time, if it has just been raised) and doubles it after a
thousand steps in which none did. A step that is refused for its loss says nothing about the scale, which DeepSpeed
can't know: then it is put back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class LossScale:
    """A view on DeepSpeed's scaler."""

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler
        # How many overflows in a row end a run is said by train.max_bad_steps.
        scaler.raise_error_at_min_scale = False

    def scalars(self) -> dict[str, int | float]:
        """What decides the scales to come."""
        scaler = self._scaler
        return {
            "loss_scale": scaler.cur_scale,
            "loss_scale_steps": scaler.cur_iter - scaler.last_overflow_iter,
            "loss_scale_hysteresis": scaler.cur_hysteresis,
        }

    def restore(self, scalars: Mapping[str, int | float]) -> None:
        """Go on from there; from a state of another dtype with the initial scale."""
        if "loss_scale" not in scalars:
            return
        scaler = self._scaler
        scaler.cur_scale = float(scalars["loss_scale"])
        scaler.last_overflow_iter, scaler.cur_iter = 0, int(scalars["loss_scale_steps"])
        scaler.cur_hysteresis = int(scalars["loss_scale_hysteresis"])
