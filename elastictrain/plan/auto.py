"""What `parallel.layout: auto` trains with at each number of workers, and what it falls back on (pure).

    plan     number of workers -> layout: what the user asked for, with the defaults of what was left open, where that
             fits and nothing is known to be faster; else, of all layouts that fit and may be as fast as the fastest,
             the one that changes least
    plans    the first is for the memory that there is; each of the others for a tenth less than the one before needs at
             most, down to the leanest layouts of all: where a layout runs out of memory, the truth is further down

All are functions of the job, the cluster's figures and what was asked for, so a number of workers always has the same
layout until memory runs out. The micro-batch decides the bits of the sums and the dropout masks: it is the one asked
for wherever that fits, and never a larger one. Offload is looked at only where nothing fits without, and for what
memory runs out of at last. Cost: about 60 us a candidate; 0.05 s for up to 4 workers, 0.2 s for up to 64, with GPUs
0.3 s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

from elastictrain.plan.choose import (
    Job,
    NothingFits,
    Option,
    host_holds,
    resorts,
    runnable,
    shortage,
    space_of,
    weigh,
    why,
)
from elastictrain.plan.figures import Figures
from elastictrain.plan.layout import (
    GradientDtype,
    Layout,
    Offload,
    Recompute,
    legal_world_sizes,
    micro_batch_ladder,
    plan_layout,
)
from elastictrain.plan.memory import Memory
from elastictrain.plan.rules import DEFAULT_ZERO_STAGE
from elastictrain.plan.space import OFFLOADS, RECOMPUTES, Candidate

DEGREES = ("pp", "tp", "sp", "ep")
"""That split a model."""
LEANER = 0.9
"""What ran out of memory is followed by what needs at most this share of it: estimates are off by up to a tenth."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user fixed; None leaves it open."""

    global_batch: int
    micro_batch: int
    """The largest one."""
    zero_stage: int | None = None
    pp: int | None = None
    tp: int | None = None
    recompute: Recompute | None = None
    sp: int | None = None
    ep: int | None = None
    offload: Offload | None = None
    drive: bool = False
    """Whether nodes have a folder for what is offloaded to drives."""
    gradient_dtype: GradientDtype = "fp32"

    @property
    def replica_size(self) -> int:
        """Workers that hold one copy of the model, as far as is asked for."""
        return (self.pp or 1) * (self.tp or 1) * (self.sp or 1)

    def layout(self, world_size: int, micro_batch: int | None = None) -> Layout:
        """With the defaults of what is left open; raises ConfigError when the world can't be split so."""
        return plan_layout(
            world_size,
            global_batch=self.global_batch,
            micro_batch=micro_batch or self.micro_batch,
            zero_stage=DEFAULT_ZERO_STAGE if self.zero_stage is None else self.zero_stage,
            pp=self.pp or 1,
            tp=self.tp or 1,
            sp=self.sp or 1,
            ep=self.ep or 1,
            offload=self.offload or "none",
            gradient_dtype=self.gradient_dtype,
            recompute=self.recompute or "none",
        )

    def world_sizes(self, low: int, high: int) -> tuple[int, ...]:
        """Those at which `layout` has one."""
        return legal_world_sizes(self.global_batch, self.micro_batch, low, high, self.replica_size, self.ep or 1)

    def ladder(self, world_sizes: Iterable[int]) -> tuple[int, ...]:
        """The micro-batch and its smaller ones, each legal at all of these sizes."""
        replicas = [size // self.replica_size for size in world_sizes]
        return micro_batch_ladder(self.global_batch, self.micro_batch, replicas)


@dataclass(frozen=True, slots=True)
class Choice:
    """The layout of one number of workers, and why it is this one."""

    layout: Layout
    why: str = ""
    runner_up: str = ""
    """The next best, and why it is not the best; empty where there was no choice."""
    memory: Memory | None = None
    """What it is estimated to need; None where that can't be told."""
    step_s: float | None = None
    """Seconds that a step is estimated to take."""

    def to_json(self) -> dict[str, Any]:
        """Plain fields."""
        return asdict(self) | {"layout": self.layout.to_json(), "memory": self.memory and self.memory.to_json()}


Plan: TypeAlias = Mapping[int, Choice]
Plans: TypeAlias = tuple[Plan, ...]


def relief(plans: Sequence[Plan], rung: int, world_size: int) -> int | None:
    """The next of the plans, after number `rung`, that needs clearly less memory with so many workers."""
    now, later = plans[rung][world_size], range(rung + 1, len(plans))
    if now.memory is None:
        return next((r for r in later if plans[r][world_size].layout != now.layout), None)
    needs = {r: _tensors(memory) for r in later if (memory := plans[r][world_size].memory)}
    clearly = next((r for r, need in needs.items() if need <= LEANER * _tensors(now.memory)), None)
    if clearly is None and needs and needs[later[-1]] < _tensors(now.memory):
        return later[-1]
    return clearly


def rung_of(plans: Sequence[Plan], layout: Layout) -> int:
    """The plan to go on with where this layout was in force: the first that has it, or else no larger micro-batch."""
    size = layout.world_size
    same = next((r for r, plan in enumerate(plans) if size in plan and plan[size].layout == layout), None)
    if same is not None:
        return same
    small = (all(c.layout.micro_batch <= layout.micro_batch for c in plan.values()) for plan in plans)
    return next((r for r, is_small in enumerate(small) if is_small), len(plans) - 1)


def as_asked(asked: Asked, low: int, high: int, why: str) -> Plans:
    """The layouts that were asked for; when memory runs out, with a smaller micro-batch."""
    sizes = asked.world_sizes(low, high)
    return tuple({n: Choice(asked.layout(n, m), why) for n in sizes} for m in asked.ladder(sizes))


def planned(job: Job, figures: Figures, asked: Asked, low: int, high: int) -> Plans:
    """The plans for `low` to `high` workers; raises NothingFits where there is surely too little memory for any."""
    usual = asked.world_sizes(low, high)
    ladder = asked.ladder(usual)
    layouts = {n: asked.layout(n) for n in usual}
    worlds = {n: _World(job, figures, asked, n, ladder, layouts.get(n)) for n in range(low, high + 1)}
    worlds = {n: world for n, world in worlds.items() if world.options}
    limit = figures.cluster.device.memory_bytes - figures.cluster.device.reserved_bytes
    first: dict[int, Choice] = {}
    for n, world in worlds.items():
        choice = world.choose(limit if figures.known else None)
        if choice is None and not figures.firm:
            choice = world.leanest("nothing is predicted to fit the memory that Ray tells of; this needs least")
        if choice and (n in usual or _pays(choice, first, figures)):
            first[n] = choice
    if not first:
        largest = worlds[max(worlds)]
        out = [(o.candidate, o.memory) for o in (*largest.options, *largest.all_offloaded)]
        raise NothingFits(shortage(job, out, figures.cluster, max(worlds)))
    return _leaner_and_leaner(first, {n: worlds[n] for n in first})


def _leaner_and_leaner(first: Plan, worlds: Mapping[int, _World]) -> Plans:
    plans, last = [first], {n: world.leanest("it needs the least memory of all") for n, world in worlds.items()}
    need, least = max(map(_need, first.values())), max(map(_need, last.values()))
    while (need := int(LEANER * need)) > least:
        plan = {n: world.choose(need) or last[n] for n, world in worlds.items()}
        if {n: c.layout for n, c in plan.items()} != {n: c.layout for n, c in plans[-1].items()}:
            plans.append(plan)
    if {n: c.layout for n, c in last.items()} != {n: c.layout for n, c in plans[-1].items()}:
        plans.append(last)
    return tuple(plans)


def _pays(choice: Choice, smaller: Plan, figures: Figures) -> bool:
    """Whether a world that can't be split as asked is known to be faster than the next smaller one."""
    if not smaller:
        return True
    before, now = smaller[max(smaller)].step_s, choice.step_s
    assert before is not None
    assert now is not None
    return (1 + figures.cluster.time_error) * now < before


@dataclass(frozen=True)
class _World:
    """All that the engines run on so many workers, weighed."""

    job: Job
    figures: Figures
    asked: Asked
    world_size: int
    ladder: tuple[int, ...]
    usual: Layout | None
    """The layout as it was asked for; None where the world can't be split so."""

    @cached_property
    def options(self) -> tuple[Option, ...]:
        """Without offload, unless it was asked for."""
        usual = [Candidate.of(self.usual)] if self.usual else []
        # the space leaves out what takes too many micro-batches
        return self._weighed(dict.fromkeys([*self._runnable(self.asked.offload or "none"), *usual]))

    @cached_property
    def all_offloaded(self) -> tuple[Option, ...]:
        """With offload, where that makes room on the devices and nobody decided on it."""
        kinds = resorts(self.figures.cluster, self.asked.drive) if self.asked.offload is None else ()
        return self._weighed(c for kind in kinds for c in self._runnable(kind))

    @cached_property
    def offloaded(self) -> tuple[Option, ...]:
        """Those that the hosts have room for."""
        cluster = self.figures.cluster
        return tuple(o for o in self.all_offloaded if host_holds(self.job, o.candidate, o.memory, cluster))

    @cached_property
    def as_asked(self) -> Option | None:
        """The usual layout, weighed."""
        usual = self.usual and Candidate.of(self.usual)
        return next((o for o in self.options if o.candidate == usual), None)

    def _runnable(self, offload: Offload) -> Iterable[Candidate]:
        asked, job = self.asked, self.job
        degrees = {name: getattr(asked, name) for name in DEGREES}
        fixed: dict[str, Any] = {name: (degree,) for name, degree in degrees.items() if degree is not None}
        fixed["zero_stage"] = (0, 1, 2, 3) if asked.zero_stage is None else (asked.zero_stage,)
        fixed["activation_checkpointing"] = RECOMPUTES if asked.recompute is None else (asked.recompute,)
        pipelines = offload == (asked.offload or "none")
        space = space_of(job, self.figures.cluster, self.world_size, offload, pipelines)
        within = max(space.most_tp_sp or 1, (asked.tp or 1) * (asked.sp or 1))  # what is given may leave the node
        return runnable(job, self.world_size, replace(space, micro_batch=self.ladder, most_tp_sp=within, **fixed))

    def _weighed(self, candidates: Iterable[Candidate]) -> tuple[Option, ...]:
        return tuple(weigh(self.job, candidate, self.figures.cluster) for candidate in candidates)

    def choose(self, limit: int | None) -> Choice | None:
        """The best that needs no more than `limit` bytes for its tensors; None where nothing does."""
        at_home = self._best_of(self.options, limit)
        if at_home or limit is None:
            return at_home
        tiers = ([o for o in self.offloaded if o.candidate.offload == kind] for kind in OFFLOADS[1:])
        return next((choice for tier in tiers if (choice := self._best_of(tier, limit))), None)

    def _best_of(self, options: Sequence[Option], limit: int | None) -> Choice | None:
        fitting = [o for o in options if limit is None or _tensors(o.memory) <= limit]
        if not fitting:
            return None
        error = self.figures.cluster.time_error
        fastest = min(fitting, key=lambda o: (o.time.step_s, o.memory.device_bytes))
        usual = self.as_asked
        beaten = usual if usual in fitting else None
        kept = beaten is not None and beaten.as_fast_as(fastest, error)
        near = [o for o in fitting if o.as_fast_as(fastest, error)]
        if beaten and not kept:
            near = [o for o in near if not beaten.as_fast_as(o, error)]
        in_order = sorted(near, key=lambda o: (self._changes(o), o.time.step_s, o.memory.device_bytes))
        best = usual if kept and usual else in_order[0]
        others = [o for o in in_order if o is not best] or [o for o in (fastest, *fitting) if o is not best]
        runner_up = f"{others[0].candidate}: {why(best, others[0])}" if others else ""
        return self._told(best, self._reason(best, usual, limit, kept), runner_up)

    def leanest(self, reason: str) -> Choice:
        """What needs the least memory."""
        options = (*self.options, *self.offloaded)
        return self._told(min(options, key=lambda o: (o.memory.device_bytes, o.time.step_s)), reason)

    def _told(self, option: Option, reason: str, runner_up: str = "") -> Choice:
        return Choice(option.candidate.layout(), reason, runner_up, option.memory, option.time.step_s)

    def _reason(self, best: Option, usual: Option | None, limit: int | None, kept: bool) -> str:
        if kept:
            return f"{self._fits(best)}; nothing is known to be faster"
        if usual is None:
            return f"{self._fits(best)}; so many workers can't share a step in the usual way"
        if limit is not None and _tensors(usual.memory) > limit:
            room = (limit + best.memory.reserved) / 1e9
            too_much = f"{usual.candidate} would need {usual.memory.device_bytes / 1e9:.4g} of {room:.4g} GB"
            return f"{too_much}; {best.memory.device_bytes / 1e9:.4g} GB do here, and nothing that fits is nearer"
        return f"{usual.candidate} would be {why(best, usual)}"

    def _fits(self, option: Option) -> str:
        needs = f"it needs {option.memory.device_bytes / 1e9:.3g}"
        if not self.figures.known:
            return f"{needs} GB (what a worker has is not known: cluster.device_memory)"
        return f"{needs} of {self.figures.cluster.device.memory_bytes / 1e9:.3g} GB"

    def _changes(self, option: Option) -> int:
        """How far it is from what was asked for: a smaller micro-batch is the least, another split the most."""
        c, stage = option.candidate, self.usual.zero_stage if self.usual else DEFAULT_ZERO_STAGE
        recompute = RECOMPUTES.index(self.usual.recompute if self.usual else "none")
        degrees = [(getattr(c, name), getattr(self.usual, name) if self.usual else 1) for name in DEGREES]
        splits: int = sum(abs(now.bit_length() - then.bit_length()) for now, then in degrees)
        return (
            2 * self.ladder.index(c.micro_batch)
            + 3 * abs(c.zero_stage - stage)
            + (0, 3, 4)[RECOMPUTES.index(c.activation_checkpointing) - recompute]
            + 5 * splits
        )


def _need(choice: Choice) -> int:
    assert choice.memory is not None
    return _tensors(choice.memory)


def _tensors(memory: Memory) -> int:
    """What the layout decides: all but what every process takes."""
    return memory.device_bytes - memory.reserved
