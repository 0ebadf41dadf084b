"""What the report says of the steps that stand (pure), in one pass over them: losses, sums, what did not count."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from elastictrain.events import StepCommitted
from elastictrain.tracking.timeline import Spread


class Trained:
    """The fold. 150 bytes a step, nearly all of them in `loss`, which lists every step."""

    def __init__(self, steps: Sequence[StepCommitted], begun_at: float, spread: Spread, measured_step: int) -> None:
        """`steps` are in step order; `spread` gets their tokens; the energy is known up to `measured_step`."""
        self.last = steps[-1] if steps else None
        self.loss: list[list[float]] = []
        self.gauges: dict[str, list[list[float]]] = {name: [] for name in (self.last.gauges if self.last else ())}
        self.skipped: list[dict[str, Any]] = []
        """What did not count, and where in the sample order its samples are."""
        self.samples = self.tokens = self.measured_tokens = 0
        self._begun_at, self._before = begun_at, array("q")
        for step in steps:
            self.loss.append([step.step, step.loss])
            self._before.append(self.samples)
            if step.skipped:
                self._skip(step)
            self.samples += step.num_samples
            self.tokens += step.num_tokens
            self.measured_tokens += step.num_tokens if step.step <= measured_step else 0
            for name, values in self.gauges.items():
                if name in step.gauges:
                    values.append([step.step, step.gauges[name]])
            spread.add(step)

    def _skip(self, step: StepCommitted) -> None:
        assert step.skipped is not None
        first = bisect_left(self.loss, step.skipped.first_step, key=_step)
        first_sample = self._before[first]
        self.skipped.append(
            {
                "step": step.step,
                "first_step": step.skipped.first_step,
                "reason": step.skipped.reason,
                "loss": step.loss,
                "limit": step.skipped.limit,
                "first_sample": first_sample,
                "num_samples": self.samples + step.num_samples - first_sample,
                "at_s": step.finished_at - self._begun_at,
            }
        )


def _step(point: list[float]) -> int:
    return int(point[0])
