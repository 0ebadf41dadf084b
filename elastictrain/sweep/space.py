"""What a sweep tries (pure): the space file, checked against the run's config before anything starts.

name: lr-sweep
metric: train/loss
trials: 8
workers: 4
search: random
scheduler: asha
space:
  train.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}
  model.dropout: {choice: [0.0, 0.1]}
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from elastictrain.config import TrainConfig
from elastictrain.config.reading import as_field_value, explain, read_yaml, refuse_unknown, set_field
from elastictrain.config.section import Section
from elastictrain.errors import ConfigError, DataError

Values = Mapping[str, Any]
"""Of a trial, by field: {"train.learning_rate": 1e-3}."""
Metric = Literal["train/loss", "perf/tokens_per_s", "eval/loss", "eval/bits_per_byte"]

AT_THE_END = frozenset({"eval/loss", "eval/bits_per_byte"})
"""Metrics of the finished model only."""
_MOST = frozenset({"perf/tokens_per_s"})
"""Metrics of which more is better."""
_FIXED = (
    *("run.", "cluster.", "elastic.", "snapshot.", "checkpoint.", "tracking.", "faults", "train.steps"),
    *("model.workload", "data.samples"),
)
"""Fields that are the same in all trials; those that name code among them, for none is taken from the storage."""
OPTIMISER = frozenset(
    f"train.{name}"
    for name in (
        *("learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "beta1", "beta2", "epsilon"),
        *("grad_clip", "on_spike", "spike_threshold"),
    )
) | {"model.dropout"}
"""Fields that a state can go on with other values of, as the PBT scheduler does."""


class Domain(Section):
    """The values of one field: exactly one of these."""

    choice: tuple[Any, ...] | None = Field(default=None, min_length=1)
    """Any of these."""
    uniform: tuple[float, float] | None = None
    """A number between these two."""
    loguniform: tuple[float, float] | None = None
    """A number between these two, each order of magnitude as likely as another."""
    integer: tuple[int, int] | None = None
    """A whole number from the first to the last."""

    @model_validator(mode="after")
    def _one(self) -> Domain:
        given = self.model_fields_set
        if len(given) != 1:
            raise ValueError(f"give one of choice, uniform, loguniform, integer: there is {', '.join(given) or 'none'}")
        low, high = self.ends
        if not self.choice and not low < high:
            raise ValueError(f"{self.kind} [{low:g}, {high:g}] is empty: the first number must be the smaller one")
        if self.kind == "loguniform" and low <= 0:
            raise ValueError(f"loguniform [{low:g}, {high:g}] must begin above 0")
        return self

    @property
    def kind(self) -> str:
        """Which of them."""
        return next(iter(self.model_fields_set))

    @property
    def ends(self) -> tuple[Any, Any]:
        """The first and the last value."""
        values = getattr(self, self.kind)
        return values[0], values[-1]

    def has(self, value: Any) -> bool:
        """Whether it is one of the values."""
        if self.choice:
            return value in self.choice
        low, high = self.ends
        return isinstance(value, int | float) and bool(low <= value <= high)

    @property
    def samples(self) -> tuple[Any, ...]:
        """Values that stand for all when they are checked."""
        return self.choice or self.ends


class Sweep(Section):
    """A sweep, as its space file describes it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,79}$")
    """The sweep's name: the same name again continues it. Its runs are NAME-1, NAME-2, ..."""
    metric: Metric = "train/loss"
    """What is compared. `train/loss` is the mean since the last report; `eval/*` comes at the end of a trial only."""
    trials: int | None = Field(default=None, ge=1)
    """How many trials; None: all combinations (search grid)."""
    workers: int | None = Field(default=None, ge=1)
    """Workers that all trials have together; None: elastic.max_workers."""
    concurrent: int | None = Field(default=None, ge=1)
    """Trials at a time, at most; None: as many as `workers` is enough for."""
    search: Literal["random", "grid", "optuna"] = "random"
    """How values are chosen: drawn, each combination of choices, or by Optuna from what earlier trials came to."""
    scheduler: Literal["none", "asha", "pbt"] = "none"
    """`asha` stops trials that are behind. `pbt` has the worst go on from a checkpoint of one of the best, with other
    values."""
    report_every: int | None = Field(default=None, ge=1)
    """Steps between two reports of a trial; None: a twentieth of train.steps."""
    grace_steps: int | None = Field(default=None, ge=1)
    """Steps that a trial is given before `asha` may stop it, or `pbt` change it; None: a tenth of train.steps."""
    reduction: int = Field(default=3, ge=2)
    """`asha` lets one in so many go on at each rung."""
    seed: int = Field(default=0, ge=0)
    """Of the values that are drawn."""
    space: dict[str, Domain] = Field(min_length=1)
    """The fields that trials differ in."""

    @field_validator("space", mode="before")
    @classmethod
    def _numbers(cls, space: Any) -> Any:
        """YAML reads 1e-4 as text."""
        if not isinstance(space, dict):
            return space
        return {key: _as_meant(key, domain) for key, domain in space.items()}

    @model_validator(mode="after")
    def _goes_together(self) -> Sweep:
        if self.metric in AT_THE_END and self.scheduler != "none":
            raise ValueError(
                f"metric {self.metric} is there at the end of a trial only, and scheduler {self.scheduler} judges "
                "trials on their way: set metric to train/loss, or scheduler to none"
            )
        if self.search == "optuna" and self.scheduler == "pbt":
            raise ValueError("search optuna does not go with scheduler pbt, which chooses values itself: use random")
        ranges = [key for key, domain in self.space.items() if not domain.choice]
        if self.search == "grid" and ranges:
            raise ValueError(f"search grid needs a choice of values for space.{ranges[0]}, not a range")
        if self.search != "grid" and self.trials is None:
            raise ValueError(f"trials is missing: how many should search {self.search} try?")
        fixed = [key for key in self.space if key.startswith(_FIXED)]
        if fixed:
            raise ValueError(f"space.{fixed[0]} is the same in all trials of a sweep: give it in the config")
        frozen = [key for key in self.space if key not in OPTIMISER]
        if self.scheduler == "pbt" and frozen:
            raise ValueError(
                f"space.{frozen[0]} can't change while a trial trains, as scheduler pbt does it: leave it out, or use "
                f"scheduler asha. It can change {', '.join(sorted(OPTIMISER))}"
            )
        return self

    @property
    def mode(self) -> Literal["min", "max"]:
        """Which end of the metric is the good one."""
        return "max" if self.metric in _MOST else "min"

    @classmethod
    def load(cls, path: str | Path, config: TrainConfig) -> Sweep:
        """Read the space file; raises ConfigError naming the value, the field and the way out."""
        data = read_yaml(Path(path), "search space")
        refuse_unknown(cls, {key: value for key, value in data.items() if key != "space"}, str(path))
        try:
            sweep = cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(explain(error, str(path))) from None
        sweep.check(config, str(path))
        return sweep

    def check(self, config: TrainConfig, where: str = "space") -> None:
        """Raise ConfigError where the config has no such field, or can't have such a value."""
        for key, domain in self.space.items():
            for value in domain.samples:
                config_of(config, {key: value}, f"{where}: space.{key}")

    def check_values(self, values: Values, where: str) -> None:
        """Raise DataError where these, read from the storage, are none of the space."""
        for key, domain in self.space.items():
            if not domain.has(values.get(key)):
                raise DataError(f"{where} has {key} {values.get(key)!r}, which is not in the sweep's space")

    def grid(self) -> Iterator[dict[str, Any]]:
        """Each combination of the choices, as many as `trials` says."""
        combined = product(*(domain.choice or () for domain in self.space.values()))
        return islice((dict(zip(self.space, values)) for values in combined), self.trials)

    def steps_between_reports(self, steps: int) -> int:
        """Of a run of so many steps."""
        return self.report_every or max(steps // 20, 1)

    def steps_of_grace(self, steps: int) -> int:
        """Of a run of so many steps."""
        return self.grace_steps or max(steps // 10, 1)


def config_of(config: TrainConfig, values: Values, where: str) -> TrainConfig:
    """The config with these values; raises ConfigError where it can't have them."""
    data = config.to_dict()
    for key, value in values.items():
        section, _, rest = key.partition(".")
        if not rest or section not in data:
            near = difflib.get_close_matches(section, data, n=1)
            hint = f"did you mean {near[0]}.{rest}?" if near and rest else "fields are written section.field"
            raise ConfigError(f"{where}: the config has no field {key}: {hint}")
        set_field(data, key, value, where)
    return TrainConfig.from_dict(data, where)


def _as_meant(key: str, domain: Any) -> Any:
    if not isinstance(domain, dict):
        return domain
    return {
        kind: [as_field_value(TrainConfig, key, value) for value in values] if isinstance(values, list) else values
        for kind, values in domain.items()
    }
