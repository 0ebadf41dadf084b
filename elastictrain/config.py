"""The one description of a run: frozen pydantic models, loaded from YAML and dotted overrides.

`TrainConfig.load(path, ["train.steps=50"])` composes left to right and validates everything that can be known before
a process starts. Unknown keys are refused with the nearest known one. Every field is documented here and in the JSON
schema (`elastictrain schema`). No torch, ray or deepspeed: loading a config costs milliseconds.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from elastictrain.errors import ConfigError
from elastictrain.plan.layout import Layout, plan_layout

FaultKind = Literal[
    "kill", "segfault", "exit", "exception", "oom", "nan", "bitflip", "stop", "loop", "skip", "slow", "preempt"
]
FaultPhase = Literal["forward", "backward", "update", "snapshot"]
FaultTarget = Literal["weights", "optimizer"]
BadStepAction = Literal["ignore", "stop", "skip", "rollback"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class RunSection(_Section):
    """Which run this is, and where it lives."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """The run's name: submitting the same name again continues the run."""
    storage: str = "runs/"
    """Folder or URI (file://, s3://, gs://) that holds everything of all runs: journal, checkpoints, data, MLflow."""


class TrainSection(_Section):
    """The optimisation: how long, how much at a time, how fast."""

    steps: int = Field(default=200, ge=1)
    """Optimizer steps in the whole run."""
    global_batch: int = Field(default=16, ge=1)
    """Sequences per step over all workers; never changes while the cluster does."""
    micro_batch: int = Field(default=4, ge=1)
    """Sequences per forward pass of one worker; gradient accumulation makes up the global batch. When a worker runs out
    of memory the run goes on with half of it."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initialisation, the sample order and dropout."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of weights and activations in forward and backward; master weights and moments stay fp32."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak learning rate of AdamW."""
    min_learning_rate: float = Field(default=3e-4, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices; norms and biases have none."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's decay of the second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    grad_clip: float = Field(default=1.0, ge=0)
    """Global gradient norm to clip to; 0 turns clipping off."""
    on_bad_loss: Literal["stop", "skip", "rollback"] = "skip"
    """What to do about a step whose loss or gradient is NaN or infinite; in no case does it change the weights. `skip`:
    its samples are used up and training goes on. `rollback`: the same, from the newest durable checkpoint's state, so
    that the steps since then are undone too. `stop`: the run ends."""
    on_spike: BadStepAction = "ignore"
    """What to do about a step whose loss is far above those before; as `on_bad_loss`."""
    spike_threshold: float = Field(default=8.0, gt=0)
    """How far above the median of the last 16 losses a spike begins, in standard deviations of the loss from step to
    step (robustly estimated over 64 steps, and at least 1 % of the median)."""
    max_bad_steps: int = Field(default=10, ge=1, le=64)
    """Bad steps in a row at which the run stops, whatever on_bad_loss and on_spike say."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, a third more compute."""
    sample_tokens: int = Field(default=64, ge=0)
    """Tokens of the sample that the finished model writes; 0 for none."""
    sample_prompt: str = "def "
    """Text that the sample continues."""


class ModelSection(_Section):
    """The language model."""

    kind: Literal["transformer", "huggingface"] = "transformer"
    """`transformer`: this project's decoder. `huggingface`: a causal model of `transformers`, from `model.path`."""
    path: str | None = None
    """Local folder with a Hugging Face config.json (kind huggingface)."""
    num_layers: int = Field(default=4, ge=1)
    """Decoder blocks."""
    hidden_size: int = Field(default=128, ge=8)
    """Width of the residual stream."""
    num_heads: int = Field(default=4, ge=1)
    """Query heads; must divide hidden_size into even head dimensions."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads (grouped-query attention); None means num_heads."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Width inside SwiGLU; None means 8/3 of hidden_size, rounded up to a multiple of 32."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout after attention and MLP, seeded per micro-batch so that it does not depend on the layout."""
    tie_embeddings: bool = True
    """Use the embedding as the output head."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary embedding."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of RMSNorm."""

    @model_validator(mode="after")
    def _heads(self) -> ModelSection:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError(
                f"model.hidden_size {self.hidden_size} / model.num_heads {self.num_heads} = "
                f"{self.hidden_size / self.num_heads:g}, which is not an even whole head dimension"
            )
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(f"model.num_kv_heads {self.num_kv_heads} does not divide model.num_heads {self.num_heads}")
        if self.kind == "huggingface" and not self.path:
            raise ValueError("model.kind huggingface needs model.path, a local folder with config.json")
        return self


class DataSection(_Section):
    """The corpus and how it becomes samples."""

    corpus: str = "python:stdlib"
    """A text file, a folder, a glob, or `python:stdlib` (the source of Python's own standard library, no tests)."""
    suffixes: tuple[str, ...] = (".py", ".txt", ".md", ".rst")
    """File endings read from a folder; a file or glob is taken as it is."""
    exclude: tuple[str, ...] = ("test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages")
    """Names of folders to leave out."""
    seq_len: int = Field(default=128, ge=8)
    """Tokens per sample that are predicted."""
    vocab_size: int = Field(default=2048, ge=257)
    """Size of the byte-level BPE vocabulary trained on the corpus."""
    validation_fraction: float = Field(default=0.02, gt=0, lt=0.5)
    """Part of the documents held out for validation."""
    validation_samples: int = Field(default=256, ge=1)
    """At most so many held-out samples are evaluated at the end."""
    num_shards: int = Field(default=8, ge=1)
    """Token shards to write; also the unit of parallel and resumable preparation."""


class ParallelSection(_Section):
    """How one model is spread over workers."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: shard nothing (0), optimizer state (1), gradients too (2), weights too (3)."""


class BudgetSection(_Section):
    """Failures in a row, with no new step between them, that a run survives, by cause. None: elastic.max_failures."""

    user: int | None = Field(default=None, ge=0)
    """Exceptions in the model's or data's code. The same one twice at the same step ends the run whatever this says."""
    crash: int | None = Field(default=None, ge=0)
    """Processes that end by themselves: an exit code, SIGSEGV, SIGABRT."""
    machine: int | None = Field(default=None, ge=0)
    """Processes that are killed, and nodes and keepers that are lost. None: ten times elastic.max_failures."""
    hang: int | None = Field(default=None, ge=0)
    """Ranks that make no progress."""
    corruption: int | None = Field(default=None, ge=0)
    """Memory that changed by itself."""
    engine: int | None = Field(default=None, ge=0)
    """Groups that can't be formed, and collectives that break while nobody is known to be dead."""
    memory: int | None = Field(default=None, ge=0)
    """Workers that the kernel or Ray kills for the node's memory; and lacks of memory at micro-batch 1."""
    start: int | None = Field(default=None, ge=0)
    """Workers that die before they are warm, with none coming up between them. The run ends only where it can't train
    without; else it starts no more for ten minutes."""


class ElasticSection(_Section):
    """How many workers, and what failures cost."""

    min_workers: int = Field(default=1, ge=1)
    """Fewest workers to go on with; with less, the run waits."""
    max_workers: int = Field(default=2, ge=1)
    """Workers to train with when the cluster has room."""
    standby: int = Field(default=1, ge=0)
    """Warm spare workers: imported, engine code loaded, waiting for a rank."""
    max_failures: int = Field(default=3, ge=0)
    """Failures of one cause in a row that the run survives, with no new step between them; see `budgets`. A run that
    gets on is never ended by failures."""
    budgets: BudgetSection = BudgetSection()
    """Other limits for single causes."""
    backoff_s: float = Field(default=1.0, ge=0)
    """Pause before the restart after the third failure in a row with no new step; it doubles with each further one.
    The first two restarts never wait."""
    max_backoff_s: float = Field(default=30.0, ge=0)
    """The longest such pause."""
    hang_patience_s: float = Field(default=3, gt=0)
    """A rank that makes no progress for so long, and for 10 of the run's longest recent steps, is replaced."""
    straggler: Literal["report", "replace", "ignore"] = "report"
    """What to do about a rank whose own work takes 1.5 times that of its peers for 8 steps: tell, or also have a
    standby take its rank at a step boundary."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs that Ray reserves for each worker."""
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """GPUs that Ray reserves for each worker; None means 1 where the cluster has any, else 0."""
    verify_every: int = Field(default=1, ge=0)
    """Steps between searches for memory that changed by itself, 0 for none. Weights are compared between the workers,
    masters and moments with their digest after the last update. With 1 nothing wrong gets into an update, and the run
    goes on from the newest snapshot, or from the one before if that was hit; with more, what came since the last search
    that found nothing is done again, from a durable checkpoint if need be, and most flips in between are not seen."""
    replace_timeout_s: float = Field(default=60, gt=0)
    """How long a lost worker's replacement may take before the run goes on smaller."""
    wait_timeout_s: float = Field(default=600, gt=0)
    """How long the run waits for min_workers before it ends."""
    orphan_timeout_s: float = Field(default=600, ge=5)
    """How long the state stays in the cluster's memory after the run's driver died: within it, submitting the run again
    goes on from there. A run that ends in any other way frees the memory at once."""
    preempt_grace_s: float = Field(default=30, gt=0)
    """How long a worker that gets SIGTERM lives on: its deadline to leave. A drained Ray node brings its own."""

    @model_validator(mode="after")
    def _range(self) -> ElasticSection:
        if self.min_workers > self.max_workers:
            raise ValueError(f"elastic.min_workers {self.min_workers} > elastic.max_workers {self.max_workers}")
        return self


class ClusterSection(_Section):
    """Which Ray cluster."""

    address: str = "auto"
    """`auto`: the cluster in RAY_ADDRESS, else an embedded one; `local`: always embedded; or a Ray address."""
    local_nodes: int = Field(default=2, ge=1)
    """Ray nodes of the embedded cluster."""
    dashboard: bool = False
    """Start the Ray dashboard with the embedded cluster, on localhost."""
    dashboard_port: int = Field(default=8265, ge=1024, le=65535)
    """Its port."""


class SnapshotSection(_Section):
    """Copies of the training state in host memory."""

    every: int | None = Field(default=None, ge=1)
    """Steps between snapshots; a failure costs at most so many. None: each step, or as often as training waits less
    than 1 % of its time for them."""


class CheckpointSection(_Section):
    """Copies of the training state in storage."""

    every: int = Field(default=50, ge=1)
    """Steps between durable checkpoints; one is always written at the end and on a stop."""
    keep_last: int = Field(default=3, ge=1)
    """Durable checkpoints to keep."""


class TrackingSection(_Section):
    """The MLflow record."""

    uri: str | None = None
    """MLflow tracking URI; None means an embedded SQLite store beside the runs."""
    experiment: str = "elastictrain"
    """MLflow experiment."""


class Fault(_Section):
    """One planned fault: for demos, game days and tests."""

    at: int = Field(ge=1)
    """Step in which it strikes."""
    rank: int = Field(default=0, ge=0)
    """Rank that it strikes."""
    kind: FaultKind = "kill"
    """kill (SIGKILL), segfault (SIGSEGV), exit (os._exit(1)), exception (raised in the model's forward pass), oom (so
    too, as torch does when an allocation fails: each fault halves the micro-batch once), nan (the loss of its first
    micro-batch becomes NaN, whatever the phase), bitflip (one bit of the rank's state changes, which is found before
    the next update if the phase is forward or backward), stop (SIGSTOP), loop (compute for ever), skip (leave out the
    next collective), slow (from now on, `seconds` more in each forward and backward pass) or preempt (SIGTERM: the
    worker leaves at a step boundary)."""
    phase: FaultPhase = "backward"
    """Where in the step: before the forward or backward pass, the optimizer update, or the snapshot."""
    seconds: float = Field(default=0.1, gt=0)
    """Of kind slow."""
    where: FaultTarget = "weights"
    """Of kind bitflip: it strikes the rank's weights, or its masters and moments."""
    repeat: bool = False
    """Strike every time that the step is tried, not only the first: a bug, not an accident."""


class TrainConfig(_Section):
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
        )

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
        """Read a YAML file (or defaults), apply `section.field=value` overrides, validate.

        A value is YAML; `field=@file` reads it from a YAML file. Raises ConfigError naming the value, the field and
        the way out.
        """
        data = _read_yaml(Path(path)) if path is not None else {}
        where = str(path) if path is not None else "the defaults"
        for override in overrides:
            _apply(data, override)
        return cls.from_dict(data, where)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "config") -> TrainConfig:
        """Validate plain data; `where` names its origin in errors."""
        _refuse_unknown(cls, data, "", where)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(_explain(error, where)) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; `from_dict` gives the same config back."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The resolved config as YAML."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        return text


FREE_TO_CHANGE = frozenset(
    {"run.storage", "train.steps", "train.micro_batch", "train.activation_checkpointing"}
    | {"train.sample_tokens", "train.sample_prompt", "data.validation_samples", "faults"}
    | {"train.on_bad_loss", "train.on_spike", "train.spike_threshold", "train.max_bad_steps"}
    | {f"{s}.*" for s in ("parallel", "elastic", "cluster", "snapshot", "checkpoint", "tracking")}
)
"""What a run may be continued with other values of: nothing that changes the samples, the model or the optimisation."""


def blocking_changes(old: TrainConfig, new: TrainConfig) -> list[tuple[str, Any, Any]]:
    """Fields (dotted, old value, new value) that forbid continuing a run begun with `old` under `new`."""
    before, after = dict(_flatten(old.to_dict())), dict(_flatten(new.to_dict()))
    changed = []
    for key in before.keys() | after.keys():
        if key in FREE_TO_CHANGE or f"{key.split('.')[0]}.*" in FREE_TO_CHANGE:
            continue
        if before.get(key) != after.get(key):
            changed.append((key, before.get(key), after.get(key)))
    return sorted(changed)


def _flatten(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"there is no config file {path}.{hint}") from None
    except OSError as error:
        raise ConfigError(f"can't read the config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if data is None:
        raise ConfigError(f"{path} is empty: write sections such as `train:` in it, as jobs/llm_tiny.yaml has them")
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}, not sections such as `train:`")
    return data


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", key):
        raise ConfigError(f"{override!r} is no override: write section.field=value, such as train.steps=50")
    if text.startswith("@"):
        source = Path(text[1:])
        try:
            value = yaml.safe_load(source.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{override}: can't read {source}: {error}") from None
    else:
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{override}: the value is not valid YAML: {error}") from None
        if isinstance(value, str) and not _takes_text(key):
            value = _number(value)
    *parents, last = key.split(".")
    for parent in parents:
        child = data.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{override}: {parent} is not a section")
        data = child
    data[last] = value


def _takes_text(key: str) -> bool:
    model: Any = TrainConfig
    for name in key.split("."):
        field = getattr(model, "model_fields", {}).get(name)
        model = field.annotation if field else None
    return model is str or str in get_args(model)


def _number(text: str) -> str | float:
    # YAML 1.1 reads 1e-3 as a string
    return float(text) if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", text) else text


def _refuse_unknown(model: type[BaseModel], data: Any, prefix: str, where: str) -> None:
    if not isinstance(data, dict):
        return
    for key, value in data.items():
        if key not in model.model_fields:
            known = _known_keys(TrainConfig)
            names = [prefix + k for k in model.model_fields]
            near = difflib.get_close_matches(f"{prefix}{key}", [*names, *known], n=1, cutoff=0.5)
            near = near or [k for k in known if k.endswith(f".{key}")][:1]
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(names)}"
            raise ConfigError(f"{where}: unknown key {prefix}{key}: {hint}")
        annotation = model.model_fields[key].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            _refuse_unknown(annotation, value, f"{prefix}{key}.", where)
        elif isinstance(value, list):
            for item in get_args(annotation):
                if isinstance(item, type) and issubclass(item, BaseModel):
                    for i, entry in enumerate(value):
                        _refuse_unknown(item, entry, f"{prefix}{key}.{i}.", where)


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys += _known_keys(annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


_WORDS = {
    "missing": "is missing",
    "tuple_type": "must be a list",
    "model_type": "must be a section of fields, such as {example}",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "literal_error": "must be {expected}",
    "string_pattern_mismatch": "must match {pattern}",
    "string_type": "must be text",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "finite_number": "must be a finite number",
}
"""Pydantic's types of errors, in the words of this project."""


def _explain(error: ValidationError, where: str) -> str:
    lines: list[str] = []
    for e in error.errors():
        if not e["loc"] or e["type"] == "value_error":
            lines.append(e["msg"].removeprefix("Value error, "))
            continue
        field = ".".join(map(str, e["loc"]))
        example = "{at: 50, rank: 1, kind: kill}" if e["loc"][0] == "faults" else "{field: value}"
        words = _WORDS.get(e["type"], e["msg"]).format(example=example, **e.get("ctx", {}))
        lines.append(f"{field} {words}" if e["type"] == "missing" else f"{field} = {e['input']!r}: {words}")
    return f"{where}: " + "; ".join(lines)
