"""A sweep as a table for a terminal (pure): best trial first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from elastictrain.sweep.record import SweepRecord


def rows(record: SweepRecord) -> Iterator[tuple[str, ...]]:
    """Trial, its values, steps, metric and state; the first row names the columns."""
    sweep = record.sweep
    yield "trial", *sweep.space, "step", sweep.metric, "state"
    for trial in record.ranked():
        values = (value_text(trial.values.get(key)) for key in sweep.space)
        score = "–" if trial.score is None else value_text(trial.score)
        name = trial.legs[-1].run if trial.legs else f"{sweep.name}-{trial.number}"
        yield name, *values, str(trial.step), score, trial.state


def value_text(value: Any) -> str:
    """A value in a few characters."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def values_text(values: Mapping[str, Any]) -> str:
    """All values of a trial in a line."""
    return ", ".join(f"{key} {value_text(value)}" for key, value in values.items())
