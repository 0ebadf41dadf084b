"""What is learned, from what and how: the sections that decide samples, model and losses.

Nearly none of it may change while a run lasts; see `changes`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from elastictrain.config.model_folder import with_folder
from elastictrain.config.section import Section
from elastictrain.plan.layout import RECOMPUTE_OF, Recompute

BadStepAction = Literal["ignore", "stop", "skip", "rollback"]
NAMED = r"^[^:]+:[A-Za-z_][A-Za-z0-9_]*$"
"""Code of the user's: see `workloads.named`."""


def _named(again: Any) -> Any:
    return RECOMPUTE_OF[again] if isinstance(again, bool) else again


class TrainSection(Section):
    """The optimisation: how long, how much at a time, how fast."""

    steps: int = Field(default=200, ge=1)
    """Optimizer steps in the whole run."""
    global_batch: int = Field(default=16, ge=1)
    """Sequences per step over all workers; never changes while the cluster does."""
    micro_batch: int = Field(default=4, ge=1)
    """Sequences per forward pass of one worker; gradient accumulation makes up the global batch. It decides the bits of
    the sums and the dropout masks, so `parallel.layout: auto` keeps it, and takes less only where memory is short."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initialisation, the sample order and dropout."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of weights and activations in forward and backward; master weights and moments stay fp32. fp16 scales the
    loss, as much as its gradients allow, and needs GPUs."""
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
    activation_checkpointing: Annotated[Recompute, BeforeValidator(_named, bool | Recompute)] | None = None
    """Compute activations of each block again in the backward pass. `full`, or true: all of them; the least memory, a
    third more compute. `selective`: only what is cheap, and no matrix product, attention or collective; about half of
    the memory for less than a tenth more time, but in tiny models. `none`, or false: nothing. None: what memory needs,
    as `parallel.layout: auto` finds it."""
    compile: bool | None = None
    """Whether torch.compile makes kernels of its own for a transformer's blocks, Hugging Face models' too (data
    parallelism and pipelines, ZeRO 0 to 2): faster steps for some seconds at each worker's start. None: in runs of
    2,000 steps or more where there is a compiler."""
    sample_tokens: int = Field(default=64, ge=0)
    """Tokens of the sample that the finished model writes; 0 for none."""
    sample_prompt: str = "def "
    """Text that the sample continues."""


class RopeScaling(Section):
    """Slower rotations for pairs that turn seldom within the texts that were trained on first (Llama 3.1)."""

    factor: float = Field(gt=0)
    """How many times slower pairs turn at most."""
    low_turns: float = Field(gt=0)
    """Pairs that make fewer turns are slowed by all of `factor`."""
    high_turns: float = Field(gt=0)
    """Pairs that make more turns are left alone; in between it goes over evenly."""
    trained_positions: int = Field(ge=1)
    """Of the texts in which turns are counted."""

    @model_validator(mode="after")
    def _in_order(self) -> RopeScaling:
        if self.low_turns >= self.high_turns:
            raise ValueError(
                f"model.rope_scaling.low_turns {self.low_turns:g} must be less than high_turns {self.high_turns:g}"
            )
        return self


class ModelSection(Section):
    """The model."""

    kind: Literal["transformer", "huggingface", "own"] = "transformer"
    """`transformer`: this project's decoder. `huggingface`: a causal model of `transformers`, from `model.path`. `own`:
    what `model.workload` names."""
    path: str | None = None
    """Local folder with a Hugging Face config.json and safetensors to start from, the same on every node. With kind
    transformer a Llama, Mistral or Mixtral, whose sizes it decides, and which can be split (docs/models.md)."""
    workload: str | None = Field(default=None, pattern=NAMED)
    """Code of yours (kind own): `path/to/file.py:NAME`, at the same path on every node, or `package.module:NAME`. NAME
    is called with the config and gives a Workload (docs/own-model.md)."""
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
    num_experts: int | None = Field(default=None, ge=2)
    """Experts in each block, in place of its MLP (docs/parallel.md); None for none."""
    experts_per_token: Literal[1, 2] = 2
    """Experts that each token goes to."""
    capacity_factor: float = Field(default=1.25, gt=0)
    """Tokens of a micro-batch that one expert takes at most, as a multiple of its even share; what is beyond passes
    the block's experts by."""
    load_balance: float = Field(default=0.01, ge=0)
    """Weight of the loss that keeps the experts evenly busy; the losses that are told are without it."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout after attention and MLP, seeded per micro-batch so that it does not depend on the layout."""
    tie_embeddings: bool = True
    """Use the embedding as the output head."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary embedding."""
    rope_scaling: RopeScaling | None = None
    """How the rotary embedding was stretched to longer texts, as Llama 3.1 has it; None for not at all."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of RMSNorm."""
    vocab_size: int | None = Field(default=None, ge=2)
    """Rows of the embedding and the head; None means as many as the tokenizer has tokens."""
    max_positions: int | None = Field(default=None, ge=8)
    """The longest text that the model is for, which an export tells; None means data.seq_len."""

    @model_validator(mode="before")
    @classmethod
    def _of_folder(cls, data: Any) -> Any:
        return with_folder(data) if isinstance(data, dict) else data

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
        if (self.kind == "own") != (self.workload is not None):
            raise ValueError(
                f"model.kind {self.kind} and model.workload {self.workload}: model.workload names the code of "
                "model.kind own, and of that alone; set both or neither"
            )
        if self.kind != "transformer" and self.num_experts is not None:
            raise ValueError(
                f"model.num_experts {self.num_experts} is for model.kind transformer: a model of kind {self.kind} has "
                "the experts that it comes with; leave model.num_experts out"
            )
        return self


class DataSection(Section):
    """The corpus and how it becomes samples."""

    corpus: str = "python:stdlib"
    """A text file, a folder, a glob, or `python:stdlib` (the source of Python's own standard library, no tests)."""
    samples: str | None = Field(default=None, pattern=NAMED)
    """In place of a corpus, for `model.kind: own`: `path/to/file.py:NAME` or `package.module:NAME`; NAME is called with
    the config and `train` or `validation`, and gives numbered samples (docs/own-data.md)."""
    suffixes: tuple[str, ...] = (".py", ".txt", ".md", ".rst")
    """File endings read from a folder; a file or glob is taken as it is."""
    exclude: tuple[str, ...] = ("test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages")
    """Names of folders to leave out."""
    seq_len: int = Field(default=128, ge=8)
    """Tokens per sample that are predicted."""
    tokenizer: str | None = None
    """A tokenizer.json, or a folder with one, at the same path on every node; byte-level. None: that of `model.path`
    where there is one, else a byte-level BPE is trained on the corpus."""
    vocab_size: int = Field(default=2048, ge=257)
    """Size of the vocabulary, where a tokenizer is trained on the corpus."""
    validation_fraction: float = Field(default=0.02, gt=0, lt=0.5)
    """Part of the documents held out for validation."""
    validation_samples: int = Field(default=256, ge=1)
    """At most so many held-out samples are evaluated at the end."""
    num_shards: int = Field(default=8, ge=1)
    """Token shards to write; also the unit of parallel and resumable preparation."""
