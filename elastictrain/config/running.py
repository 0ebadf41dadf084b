"""Where and how a run is carried out: the sections that decide nothing about its samples, model or losses."""

from __future__ import annotations

from typing import Literal

from pydantic import ByteSize, Field, model_validator

from elastictrain.config.section import Section
from elastictrain.plan.layout import GradientDtype, Offload


class RunSection(Section):
    """Which run this is, and where it lives."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """The run's name: submitting the same name again continues the run."""
    storage: str = "runs/"
    """Folder or URI (file://, s3://, gs://) that holds everything of all runs: journal, checkpoints, data, MLflow."""
    start_from: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}@\d+$")
    """`RUN@STEP`: begin with that checkpoint of another run of the same storage: its weights, optimizer, step and place
    in the data, under any layout. The model, the data and train.global_batch must be the same. None: from the start."""


class ParallelSection(Section):
    """How one model is spread over workers (docs/parallel.md)."""

    layout: Literal["auto", "manual"] = "auto"
    """`auto`: the planner chooses, for each number of workers, what is left out below (docs/plan.md). `manual`: what is
    left out below is 1, or none. The number of the model's copies follows from the workers that there are."""
    pp: int | None = Field(default=None, ge=1)
    """Stages of the pipeline: each worker holds some of the layers, of about equal cost."""
    tp: int | None = Field(default=None, ge=1)
    """Workers that share each matrix: attention heads, MLP and vocabulary are split among them."""
    ep: int | None = Field(default=None, ge=1)
    """Copies of the model that share its experts (with model.num_experts): each of ep workers has some of them, and a
    token's vector goes to the worker that has its expert. The number of workers is a multiple of it."""
    sp: int | None = Field(default=None, ge=1)
    """Workers that share each sequence, for long ones: each computes data.seq_len / sp positions, and within attention
    all positions of its share of the heads. Not with pp, tp or ep."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed ZeRO stage: shard nothing (0), optimizer state (1), gradients too (2), weights too (3). With pp
    0 or 1, with ep 0 to 2."""
    offload: Offload | None = None
    """Where what ZeRO shards lies between its uses, from stage 1 on: on the device (none); in the host's memory, where
    the update is made too (cpu); masters and moments in files on the host's drive (nvme). With ZeRO 3 the weights lie
    in the host's memory as well. Left open, `auto` takes cpu where nothing fits GPUs without, and nvme, given
    offload_path, where nothing fits without that."""
    gradient_dtype: GradientDtype = "fp32"
    """What gradients travel as when the copies of the model average them. `bf16` is half the traffic of `fp32`, `int8`
    a quarter, for losses that are a little off (docs/parallel.md); `int8` needs ZeRO 3. Asked for, never chosen."""
    offload_path: str | None = Field(default=None, pattern=r"^/")
    """Folder on a fast drive of every node, for offload nvme; 12 bytes a parameter are shared by the workers there."""

    @property
    def replica_size(self) -> int:
        """Workers that hold one copy of the model together, as far as is asked for."""
        return (self.pp or 1) * (self.tp or 1) * (self.sp or 1)

    @model_validator(mode="after")
    def _has_its_drive(self) -> ParallelSection:
        if self.offload == "nvme" and self.offload_path is None:
            raise ValueError(
                "parallel.offload nvme needs parallel.offload_path, a folder on a fast drive of every node: set it, or "
                "parallel.offload to cpu"
            )
        unused = self.offload not in ("nvme", None) or (self.offload is None and self.layout == "manual")
        if unused and self.offload_path is not None:
            raise ValueError(
                f"parallel.offload_path {self.offload_path} counts only with parallel.offload nvme, or with that left "
                "open under parallel.layout auto: set parallel.offload nvme too, or leave parallel.offload_path out"
            )
        return self


class BudgetSection(Section):
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


class ElasticSection(Section):
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
    """CPUs that Ray reserves for each worker. On CPUs a worker computes with so many threads (whole ones), unless its
    node's Ray was started with OMP_NUM_THREADS."""
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


class ClusterSection(Section):
    """Which Ray cluster."""

    address: str = "auto"
    """`auto`: the cluster in RAY_ADDRESS, else an embedded one; `local`: always embedded; or a Ray address."""
    local_nodes: int = Field(default=2, ge=1)
    """Ray nodes of the embedded cluster."""
    device_memory: ByteSize | None = Field(default=None, gt=0)
    """Memory that a worker may use, of its GPU or, without GPUs, of its node: bytes, or such as 24GiB. None: what Ray
    says of the cluster. `parallel.layout: auto` plans for it."""
    dashboard: bool = False
    """Start the Ray dashboard with the embedded cluster, on localhost."""
    dashboard_port: int = Field(default=8265, ge=1024, le=65535)
    """Its port."""
    worker_cost_per_hour: float | None = Field(default=None, ge=0)
    """What an hour of one worker costs, with its share of the node, in any currency: then the report says what the run
    cost, and what a million tokens did. None: not told."""


class SnapshotSection(Section):
    """Copies of the training state in host memory."""

    every: int | None = Field(default=None, ge=1)
    """Steps between snapshots; a failure costs at most so many. None: each step, or as often as training waits less
    than 1 % of its time for them."""


class CheckpointSection(Section):
    """Copies of the training state in storage."""

    every: int = Field(default=50, ge=1)
    """Steps between durable checkpoints; one is always written at the end and on a stop."""
    keep_last: int = Field(default=3, ge=1)
    """Durable checkpoints to keep."""
    signing_key_file: str | None = Field(default=None, pattern=r"^[/~]")
    """File with the key that signs checkpoints and checks them, at the same absolute path on every node and readable
    by nobody else: one that is not signed with it is never loaded (docs/security.md). None: not signed."""


class TrackingSection(Section):
    """The MLflow record."""

    uri: str | None = None
    """MLflow tracking URI; None means an embedded SQLite store beside the runs."""
    experiment: str = "elastictrain"
    """MLflow experiment."""
    parent: str | None = Field(default=None, pattern=r"^[0-9a-f]{1,64}$")
    """Id of the MLflow run that this one is shown under, as a sweep's trials are."""
