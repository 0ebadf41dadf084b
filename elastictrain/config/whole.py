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
        model, pp, tp = self.model, self.parallel.pp, self.parallel.tp
        if self.data.samples is not None and model.kind != "own":
            raise ValueError(
                f"data.samples {self.data.samples} needs model.kind own, not {model.kind}, which learns text: leave "
                "data.samples out, or set model.kind and model.workload"
            )
        if model.kind != "transformer" and pp * tp > 1:
            raise ValueError(
                f"parallel.pp {pp} and parallel.tp {tp} can't split model.kind {model.kind}, only this project's "
                "transformer: set both to 1, and parallel.zero_stage 3 where the model is too large for one worker"
            )
        if tp > 1 and self.train.dtype == "bf16" and not self.parallel.zero_stage:
            raise ValueError(
                f"parallel.tp {tp} with train.dtype bf16 and parallel.zero_stage 0: DeepSpeed's norm of the gradient "
                "would leave out what other workers of a replica hold; set parallel.zero_stage to 1"
            )
        if self.train.dtype == "fp16" and (pp * tp > 1 or not self.parallel.zero_stage):
            raise ValueError(
                "train.dtype fp16 is written for parallel.zero_stage 1, 2 and 3 of models that are not split: set that "
                "and parallel.pp and parallel.tp to 1, or train.dtype to bf16"
            )
        heads = model.num_kv_heads or model.num_heads
        if heads % tp:
            raise ValueError(
                f"parallel.tp {tp} workers can't share {heads} heads of keys and values evenly: set parallel.tp to a "
                "divisor of model.num_kv_heads (of model.num_heads where that is not set)"
            )
        self._check_sequences()
        if pp > model.num_layers:
            raise ValueError(
                f"parallel.pp {pp} stages can't share model.num_layers {model.num_layers}: each needs at least one; "
                f"set parallel.pp to at most {model.num_layers}"
            )
        return self

    def _check_sequences(self) -> None:
        sp, seq_len, heads = self.parallel.sp, self.data.seq_len, self.model.num_heads
        if sp > 1 and self.model.kind != "transformer":
            raise ValueError(
                f"parallel.sp {sp} can't split sequences of model.kind {self.model.kind}, only those of this project's "
                "transformer: set parallel.sp to 1, and train.activation_checkpointing where memory is short"
            )
        if seq_len % sp:
            raise ValueError(
                f"parallel.sp {sp} workers can't share sequences of data.seq_len {seq_len} evenly: {seq_len} / {sp} = "
                f"{seq_len / sp:g}; set parallel.sp to a divisor of data.seq_len"
            )
        if heads % sp:
            raise ValueError(
                f"parallel.sp {sp} workers can't share {heads} attention heads evenly, as they do within attention: "
                "set parallel.sp to a divisor of model.num_heads"
            )

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
        """The layout at this world size; raises ConfigError with the arithmetic when there is none.

        `micro_batch` is the one in force where memory has run out; None means train.micro_batch.
        """
        return plan_layout(
            world_size,
            global_batch=self.train.global_batch,
            micro_batch=micro_batch or self.train.micro_batch,
            zero_stage=self.parallel.zero_stage,
            pp=self.parallel.pp,
            tp=self.parallel.tp,
            sp=self.parallel.sp,
            offload=self.parallel.offload,
        )

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
        """Read a YAML file (or defaults), apply `section.field=value` overrides, validate.

        A value is YAML; `field=@file` reads it from a YAML file. Raises ConfigError naming the value, the field and
        the way out.
        """
        data = read_yaml(Path(path)) if path is not None else {}
        where = str(path) if path is not None else "the defaults"
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
