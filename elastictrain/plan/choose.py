"""Which layout to train with, and why (pure).

All legal candidates are weighed: those that fit the device's memory are ranked by the seconds of a step, then by
memory. Those seconds are predictions: of two that differ by less than their error neither is known to be the faster,
so a config whose layout is as good as the best, as far as can be told, is left as it is. Where nothing fits,
`NothingFits` says by how much the leanest candidate misses. Cost: about 35 us a candidate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from elastictrain.errors import ConfigError
from elastictrain.plan.cluster import TIME_ERROR, Cluster, Dtype
from elastictrain.plan.layout import GradientDtype, Recompute
from elastictrain.plan.memory import Memory, memory_of
from elastictrain.plan.model_shape import ModelShape
from elastictrain.plan.rules import SPLIT_KIND, refusal
from elastictrain.plan.space import Candidate, Choices, enumerate_layouts, splits_of
from elastictrain.plan.step_time import StepTime, model_flops, step_time


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be trained."""

    shape: ModelShape
    dtype: Dtype
    global_batch: int
    splits: bool = True
    """Whether the model can be dealt out to several workers."""
    gradient_dtype: GradientDtype = "fp32"
    """What gradients travel as, which the user decides."""
    fp16: bool = False
    """In fp16: as large as bf16 and as fast, but not every engine runs it."""

    def runs(self, candidate: Candidate) -> bool:
        """Whether this project's engines can train so."""
        c, shape = candidate, self.shape
        return not refusal(
            "fp16" if self.fp16 else self.dtype,
            zero_stage=c.zero_stage,
            pp=c.pp,
            tp=c.tp,
            sp=c.sp,
            ep=c.ep,
            offload=c.offload,
            gradient_dtype=c.gradient_dtype,
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            num_experts=shape.num_experts,
            seq_len=shape.seq_len,
            kind=SPLIT_KIND if self.splits else "another",
        )

    @property
    def tokens_per_step(self) -> int:
        """Predictions in a step."""
        return self.global_batch * self.shape.seq_len


@dataclass(frozen=True, slots=True)
class Option:
    """A candidate, weighed."""

    candidate: Candidate
    memory: Memory
    time: StepTime

    def tokens_per_s(self, job: Job) -> float:
        """Over all ranks."""
        return job.tokens_per_step / self.time.step_s

    def utilisation(self, job: Job, cluster: Cluster) -> float:
        """Share of the devices' peak, without what is recomputed or masked."""
        peak = self.candidate.world_size * cluster.device.flops[job.dtype]
        return model_flops(job.shape, job.global_batch) / self.time.step_s / peak

    def as_fast_as(self, other: Option, error: float = TIME_ERROR) -> bool:
        """Whether it is no slower, as far as the predictions can tell."""
        return self.time.step_s <= (1 + error) * other.time.step_s

    def to_json(self) -> dict[str, Any]:
        """Plain fields."""
        return {
            "layout": self.candidate.to_json(),
            "memory": self.memory.to_json(),
            "time": self.time.to_json(),
        }


@dataclass(frozen=True, slots=True)
class Ranking:
    """Every candidate of one world that fits, the best first; never empty."""

    options: tuple[Option, ...]
    num_looked_at: int
    """Candidates that were weighed; more recomputation only where less of it does not fit, and more may."""

    @property
    def best(self) -> Option:
        """The fastest."""
        return self.options[0]

    def best_run_by(self, job: Job) -> Option | None:
        """The fastest that this project's engines run."""
        return next((option for option in self.options if job.runs(option.candidate)), None)

    def best_of_each_kind(self) -> tuple[Option, ...]:
        """The best micro-batch of each combination of degrees, ZeRO stage, offload and recomputation."""
        kinds: dict[tuple[Any, ...], Option] = {}
        for option in self.options:
            c = option.candidate
            kinds.setdefault(
                (c.dp, c.pp, c.tp, c.ep, c.sp, c.zero_stage, c.offload, c.activation_checkpointing), option
            )
        return tuple(kinds.values())


class NothingFits(ConfigError):
    """No legal layout of this world fits the devices."""


def weigh(job: Job, candidate: Candidate, cluster: Cluster) -> Option:
    """A candidate's memory and time."""
    memory = memory_of(job.shape, job.dtype, candidate, cluster.device)
    return Option(candidate, memory, step_time(job.shape, job.dtype, candidate, cluster))


def fits(memory: Memory, cluster: Cluster) -> bool:
    """Whether the device, its host and the drives hold what they must."""
    host = memory.host_bytes * cluster.devices_per_node <= cluster.host_memory_bytes
    return host and memory.device_bytes <= cluster.device.memory_bytes


def rank_layouts(job: Job, cluster: Cluster, world_size: int, choices: Choices | None = None) -> Ranking:
    """The candidates of this world that fit, the best first; without `choices`, of all that the engines run.

    Raises NothingFits with the arithmetic; ConfigError when no layout is legal at all.
    """
    all_choices = replace(choices or _all_splits(job, cluster, world_size), gradient_dtype=job.gradient_dtype)
    ways, looked_at, options = all_choices.activation_checkpointing, 0, list[Option]()

    def candidates(ways: Sequence[Recompute]) -> Iterator[Candidate]:
        some = replace(all_choices, activation_checkpointing=ways)
        found = enumerate_layouts(job.shape, world_size, job.global_batch, some)
        return found if choices else (candidate for candidate in found if job.runs(candidate))

    for plainest in candidates(ways[:1]):
        for way in ways:
            candidate = replace(plainest, activation_checkpointing=way)
            memory = memory_of(job.shape, job.dtype, candidate, cluster.device)
            looked_at += 1
            if fits(memory, cluster):
                options.append(Option(candidate, memory, step_time(job.shape, job.dtype, candidate, cluster)))
                break  # to recompute more takes longer
            if memory.device_bytes - memory.activations - memory.fragmentation > cluster.device.memory_bytes:
                break  # nor would it help
    if options:
        options.sort(key=lambda o: (o.time.step_s, o.memory.device_bytes))
        return Ranking(tuple(options), looked_at)
    if not looked_at:
        raise ConfigError(
            f"{world_size} workers can't share a step of train.global_batch {job.global_batch}: no micro-batch comes "
            "out whole; make train.global_batch a multiple of the number of workers"
        )
    needs = ((memory_of(job.shape, job.dtype, c, cluster.device), c) for c in candidates(ways))
    raise NothingFits(shortage(*min(needs, key=lambda need: need[0].device_bytes), cluster, world_size))


def _all_splits(job: Job, cluster: Cluster, world_size: int) -> Choices:
    return splits_of(job.shape, world_size, cluster.devices_per_node) if job.splits else Choices()


def world_sizes(job: Job, cluster: Cluster, sizes: Iterable[int]) -> dict[int, Option | None]:
    """The best option of each of these numbers of workers; None where nothing fits."""
    found: dict[int, Option | None] = {}
    for world_size in sizes:
        try:
            found[world_size] = rank_layouts(job, cluster, world_size).best
        except NothingFits:
            found[world_size] = None
    return found


def advise(ranking: Ranking, as_written: Option | None, cluster: Cluster) -> Option:
    """What to train with: what the config has, if that fits and nothing is known to be faster; else the best."""
    if as_written and fits(as_written.memory, cluster) and as_written.as_fast_as(ranking.best):
        return as_written
    return ranking.best


def why(winner: Option, loser: Option) -> str:
    """What the winner saves over the loser, the largest difference first."""
    ours, theirs = asdict(winner.time), asdict(loser.time)
    differences = sorted(((theirs[part] - ours[part], part) for part in ours), reverse=True)
    saved = [(seconds, part) for seconds, part in differences if seconds > 0.05 * differences[0][0]][:2]
    if loser.time.step_s <= winner.time.step_s or not saved:
        less = loser.memory.device_bytes - winner.memory.device_bytes
        return f"as fast, with {less / 1e9:.3g} GB less memory" if less > 0 else "as fast, with as much memory"
    slower = loser.time.step_s / winner.time.step_s - 1
    parts = " and ".join(f"{part.replace('_', ' ')} ({seconds:.3g} s)" for seconds, part in saved)
    error = ", within the error" if loser.as_fast_as(winner) else ""
    share = f"{100 * slower:.2g}" if slower < 1 else f"{100 * slower:.0f}"
    return f"{share} % slower{error}: more {parts}"


def shortage(memory: Memory, candidate: Candidate, cluster: Cluster, world_size: int) -> str:
    """That nothing fits, with the arithmetic of the candidate that needs least."""
    device = cluster.device
    parts = [
        (name, getattr(memory, name))
        for name in ("weights", "gradients", "optimizer", "activations", "buffers", "fragmentation", "reserved")
    ]
    total = " + ".join(f"{name} {num_bytes / 1e9:.3g}" for name, num_bytes in parts if num_bytes)
    return (
        f"no layout of {world_size} workers fits {device.name} with {device.memory_bytes / 1e9:.3g} GB: the leanest, "
        f"{candidate}, needs {total} = {memory.device_bytes / 1e9:.3g} GB a worker. Use more workers, a smaller "
        "model.hidden_size, model.num_layers or data.seq_len, or devices with more memory (a larger "
        "cluster.device_memory, if that is set)."
    )
