"""Everything about one run, composed from its sections; what only all of them together can tell is checked here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from elastictrain.config.fault import Fault
from elastictrain.config.learning import DataSection, ModelSection, TrainSection
from elastictrain.config.reading import apply_override, explain, read_yaml, refuse_unknown
from elastictrain.config.running import (
    CheckpointSection,
    ClusterSection,
    ElasticSection,
    ParallelSection,
    RunSection,
    SnapshotSection,
    TrackingSection,
)
from elastictrain.config.section import Section
from elastictrain.errors import ConfigError
from elastictrain.plan.layout import Layout, plan_layout
from elastictrain.plan.rules import DEFAULT_ZERO_STAGE, refusal


class TrainConfig(Section):
    """Everything about one run."""

    run: RunSection = RunSection()
    train: TrainSection = TrainSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    parallel: ParallelSection = ParallelSection()
    elastic: ElasticSection = ElasticSection()
    cluster: ClusterSection = ClusterSection()
    snapshot: SnapshotSection = SnapshotSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()
    faults: tuple[Fault, ...] = ()
    """Faults to inject."""

    @model_validator(mode="after")
    def _model_splits(self) -> TrainConfig:
        model, parallel = self.model, self.parallel
        if self.data.samples is not None and model.kind != "own":
            raise ValueError(
                f"data.samples {self.data.samples} needs model.kind own, not {model.kind}, which learns text: leave "
                "data.samples out, or set model.kind and model.workload"
            )
        if model.max_positions is not None and self.data.seq_len > model.max_positions:
            raise ValueError(
                f"data.seq_len {self.data.seq_len} exceeds model.max_positions {model.max_positions}: lower "
                f"data.seq_len to at most {model.max_positions}"
            )
        if self.train.compile and model.kind == "own":
            raise ValueError(
                "train.compile true is not for model.kind own: leave it out; a model of your own can call "
                "torch.compile where it is made"
            )
        problem = refusal(
            self.train.dtype,
            zero_stage=self._zero_stage,
            pp=parallel.pp or 1,
            tp=parallel.tp or 1,
            sp=parallel.sp or 1,
            ep=parallel.ep or 1,
            offload=parallel.offload or "none",
            gradient_dtype=parallel.gradient_dtype,
            num_layers=model.num_layers,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads or model.num_heads,
            num_experts=model.num_experts or 1,
            seq_len=self.data.seq_len,
            kind=model.kind,
        )
        if problem:
            raise ValueError(problem)
        return self

    @property
    def _zero_stage(self) -> int:
        stage = self.parallel.zero_stage
        return DEFAULT_ZERO_STAGE if stage is None else stage

    @model_validator(mode="after")
    def _whole_step(self) -> TrainConfig:
        try:
            self.layout(self.elastic.max_workers)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        for number, fault in enumerate(self.faults):
            if fault.rank >= self.elastic.max_workers:
                raise ValueError(
                    f"faults.{number}.rank {fault.rank} never strikes: with elastic.max_workers "
                    f"{self.elastic.max_workers} the highest rank is {self.elastic.max_workers - 1}"
                )
        return self

    def late_faults(self) -> list[tuple[int, Fault]]:
        """Planned faults (with their number) whose step is after the last: a shorter rehearsal of a longer run."""
        return [(number, fault) for number, fault in enumerate(self.faults) if fault.at > self.train.steps]

    def layout(self, world_size: int, micro_batch: int | None = None) -> Layout:
        """The layout at this world size with what is asked for, and the defaults of what is not.

        Raises ConfigError with the arithmetic when there is none. `micro_batch` is another than train.micro_batch.
        """
        return plan_layout(
            world_size,
            global_batch=self.train.global_batch,
            micro_batch=micro_batch or self.train.micro_batch,
            zero_stage=self._zero_stage,
            pp=self.parallel.pp or 1,
            tp=self.parallel.tp or 1,
            sp=self.parallel.sp or 1,
            ep=self.parallel.ep or 1,
            offload=self.parallel.offload or "none",
            gradient_dtype=self.parallel.gradient_dtype,
            recompute=self.train.activation_checkpointing or "none",
        )

    def under(self, layout: Layout) -> TrainConfig:
        """The same run as this layout has it: with its activation checkpointing."""
        train = self.train.model_copy(update={"activation_checkpointing": layout.recompute})
        return self.model_copy(update={"train": train})

    def compiling(self, compiles: bool) -> TrainConfig:
        """The same run with `train.compile` decided."""
        return self.model_copy(update={"train": self.train.model_copy(update={"compile": compiles})})

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
        """Read a YAML file (or defaults), apply `section.field=value` overrides, validate.

        A value is YAML; `field=@file` reads it from a YAML file. Raises ConfigError naming the value, the field and
        the way out.
        """
        data = read_yaml(Path(path)) if path is not None else {}
        where = str(path) if path is not None else "the defaults"
        if overrides:
            where += " and the command line"
        for override in overrides:
            apply_override(cls, data, override)
        return cls.from_dict(data, where)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "config") -> TrainConfig:
        """Validate plain data; `where` names its origin in errors."""
        refuse_unknown(cls, data, where)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(explain(error, where)) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; `from_dict` gives the same config back."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The resolved config as YAML."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        return text
