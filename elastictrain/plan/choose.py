"""Which layout to train with, and why (pure).

All legal candidates are weighed: those that fit the device's memory are ranked by the seconds of a step, then by
memory. Those seconds are predictions: of two that differ by less than their error neither is known to be the faster,
so a config whose layout is as good as the best, as far as can be told, is left as it is. Where nothing fits,
`NothingFits` says by how much the leanest candidate misses. Cost: about 35 us a candidate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from elastictrain.errors import ConfigError
from elastictrain.plan.cluster import TIME_ERROR, Cluster, Dtype
from elastictrain.plan.layout import GradientDtype, Offload, Recompute
from elastictrain.plan.memory import Memory, memory_of
from elastictrain.plan.model_shape import ModelShape
from elastictrain.plan.rules import SPLIT_KIND, refusal
from elastictrain.plan.space import RECOMPUTES, Candidate, Choices, enumerate_layouts, splits_of
from elastictrain.plan.step_time import StepTime, model_flops, step_time

SNAPSHOTS = 2
"""Of each rank's state that a keeper has: the newest, and the one that is being written."""
STATE_BYTES = 12
"""Of a parameter with its two moments, in fp32."""


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

    def fits(self, job: Job, cluster: Cluster) -> bool:
        """Whether the device and its host hold what they must."""
        return fits(job, self.candidate, self.memory, cluster)

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


Needed: TypeAlias = tuple[Candidate, Memory]
"""A candidate, and what each of its workers needs."""


class NothingFits(ConfigError):
    """No legal layout of this world fits the devices."""


def weigh(job: Job, candidate: Candidate, cluster: Cluster) -> Option:
    """A candidate's memory and time."""
    memory = need(job, candidate, cluster)
    return Option(candidate, memory, step_time(job.shape, job.dtype, candidate, cluster))


def need(job: Job, candidate: Candidate, cluster: Cluster) -> Memory:
    """What each worker needs; where device and host have one memory, all of it there."""
    memory = memory_of(job.shape, job.dtype, candidate, cluster.device)
    return memory.in_one_memory() if cluster.one_memory else memory


def fits(job: Job, candidate: Candidate, memory: Memory, cluster: Cluster) -> bool:
    """Whether the device and its host hold what they must."""
    return memory.device_bytes <= cluster.device.memory_bytes and host_holds(job, candidate, memory, cluster)


def host_holds(job: Job, candidate: Candidate, memory: Memory, cluster: Cluster) -> bool:
    """Whether a node's host has room for what its workers offload, beside the snapshots of their state."""
    if not memory.host_bytes:
        return True
    world, here = candidate.world_size, min(candidate.world_size, cluster.devices_per_node)
    copies = SNAPSHOTS * (2 if world > here else 1)  # those of a buddy on another node too
    snapshot = STATE_BYTES * job.shape.num_parameters // world
    return here * (memory.host_bytes + copies * snapshot) <= cluster.host_memory_bytes


def rank_layouts(
    job: Job, cluster: Cluster, world_size: int, choices: Choices | None = None, drive: bool = False
) -> Ranking:
    """The candidates of this world that fit, the best first.

    Without `choices`, of all that the engines run, with offload where nothing fits without; `drive` says that it may
    go to drives. Raises NothingFits with the arithmetic; ConfigError when no layout is legal at all.
    """
    if choices:
        every, ways = replace(choices, gradient_dtype=job.gradient_dtype), choices.activation_checkpointing
        plainest = replace(every, activation_checkpointing=ways[:1])
        found = enumerate_layouts(job.shape, world_size, job.global_batch, plainest)
        options, out = _fitting(job, cluster, found, ways)
    else:
        ways = RECOMPUTES
        options, out = _fitting(job, cluster, _plainest(job, world_size, space_of(job, cluster, world_size)), ways)
        for kind in resorts(cluster, drive):
            if not options:
                away = space_of(job, cluster, world_size, kind, pipelines=False)
                options, too_large = _fitting(job, cluster, _plainest(job, world_size, away), ways)
                out += too_large
    if options:
        options.sort(key=lambda o: (o.time.step_s, o.memory.device_bytes))
        return Ranking(tuple(options), len(options) + len(out))
    if not out:
        raise ConfigError(
            f"{world_size} workers can't share a step of train.global_batch {job.global_batch}: no micro-batch comes "
            "out whole; make train.global_batch a multiple of the number of workers"
        )
    leanest = dict.fromkeys(replace(c, activation_checkpointing=ways[-1]) for c, _ in out)
    out += [(candidate, need(job, candidate, cluster)) for candidate in leanest]
    raise NothingFits(shortage(job, out, cluster, world_size))


def _plainest(job: Job, world_size: int, space: Choices) -> Iterable[Candidate]:
    return runnable(job, world_size, replace(space, activation_checkpointing=RECOMPUTES[:1]))


def _fitting(
    job: Job, cluster: Cluster, plainest: Iterable[Candidate], ways: Sequence[Recompute]
) -> tuple[list[Option], list[Needed]]:
    """The candidates with the least recomputation of `ways` that lets them fit, weighed; what others need."""
    options, out = list[Option](), list[Needed]()
    for plain in plainest:
        for way in ways:
            candidate = replace(plain, activation_checkpointing=way)
            memory = need(job, candidate, cluster)
            if fits(job, candidate, memory, cluster):
                options.append(Option(candidate, memory, step_time(job.shape, job.dtype, candidate, cluster)))
                break  # to recompute more takes longer
            out.append((candidate, memory))
            if memory.device_bytes - memory.activations - memory.fragmentation > cluster.device.memory_bytes:
                break  # nor would it help
    return options, out


def resorts(cluster: Cluster, drive: bool) -> tuple[Offload, ...]:
    """What offload makes room on the devices, the less drastic first; `drive` says that nodes have a folder for it."""
    to_hosts: tuple[Offload, ...] = () if cluster.one_memory else ("cpu",)
    return (*to_hosts, "nvme") if drive else to_hosts


def space_of(job: Job, cluster: Cluster, world_size: int, offload: Offload = "none", pipelines: bool = True) -> Choices:
    """What may be varied to find what the engines run, all of it with this offload.

    As a last resort offload is looked at without `pipelines`: ZeRO 3, which goes with the other splits, is leaner.
    """
    space = splits_of(job.shape, world_size, cluster.devices_per_node) if job.splits else Choices()
    if not pipelines:
        space = replace(space, pp=(1,))
    return replace(space, offload=(offload,), gradient_dtype=job.gradient_dtype)


def runnable(job: Job, world_size: int, space: Choices) -> Iterable[Candidate]:
    """What the engines run in this space, each once."""
    return filter(job.runs, enumerate_layouts(job.shape, world_size, job.global_batch, space))


def world_sizes(job: Job, cluster: Cluster, sizes: Iterable[int], drive: bool = False) -> dict[int, Option | None]:
    """The best option of each of these numbers of workers; None where nothing fits."""
    found: dict[int, Option | None] = {}
    for world_size in sizes:
        try:
            found[world_size] = rank_layouts(job, cluster, world_size, drive=drive).best
        except NothingFits:
            found[world_size] = None
    return found


def advise(job: Job, ranking: Ranking, as_written: Option | None, cluster: Cluster) -> Option:
    """What to train with: what the config has, if that fits and nothing is known to be faster; else the best."""
    if as_written and as_written.as_fast_as(ranking.best) and as_written.fits(job, cluster):
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


def shortage(job: Job, out: Sequence[Needed], cluster: Cluster, world_size: int) -> str:
    """That nothing fits, with the arithmetic of what needs least, of all these."""
    device = cluster.device
    at_home = [(c, m) for c, m in out if not m.host_bytes] or out
    candidate, memory = min(at_home, key=lambda needed: needed[1].device_bytes)
    parts = [
        (name, getattr(memory, name))
        for name in ("weights", "gradients", "optimizer", "activations", "buffers", "fragmentation", "reserved")
    ]
    total = " + ".join(f"{name} {num_bytes / 1e9:.3g}" for name, num_bytes in parts if num_bytes)
    away = [c for c, m in out if m.host_bytes and m.device_bytes <= device.memory_bytes]
    host = f"offload needs hosts with more than {cluster.host_memory_bytes / 1e9:.3g} GB" if away else ""
    return (
        f"no layout of {world_size} workers fits {device.name} with {device.memory_bytes / 1e9:.3g} GB: the leanest, "
        f"{candidate}, needs {total} = {memory.device_bytes / 1e9:.3g} GB a worker{host and f'; {host}'}. Use more "
        "workers, a smaller model.hidden_size, model.num_layers or data.seq_len, or devices with more memory (a larger "
        "cluster.device_memory, if that is set)."
    )
