"""The layout of a world of ranks, and which world sizes a job can run at.

    world = dp x pp x tp x sp        global batch = micro-batch x accumulation x dp, which never changes

A replica of the model is pp stages of tp x sp ranks each; dp replicas share the micro-batches of a step. With expert
parallelism ep neighbours among the replicas hold the experts together, so dp is a multiple of ep. The micro-batch is
fixed by the user (it decides what is computed together, hence the float sums and the dropout masks), so accumulation
is what adapts, and a world size is legal when it is a whole number of replicas that divides the number of micro-batches
in a step. Only a lack of memory makes the micro-batch smaller, along `micro_batch_ladder`.

Ranks are placed so that the talkative ones are neighbours: tp innermost, then sp, then dp, then pp (Narayanan et al.
2021, Takeaway 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from elastictrain.errors import ConfigError

Offload = Literal["none", "cpu", "nvme"]
"""Where what ZeRO shards lies between its uses: on the device, in the host's memory, on the host's drives."""
GradientDtype = Literal["fp32", "bf16", "int8"]
"""What gradients travel as between the ranks that average them."""
Recompute = Literal["none", "selective", "full"]
"""Which activations of a block are computed again in the backward pass: none, those that are cheap, or all."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands in its layout; each counts from 0."""

    pp: int
    """The stage of the pipeline that it computes."""
    dp: int
    """The replica of the model that it is part of."""
    tp: int
    """Its share of each split matrix."""
    sp: int = 0
    """Its share of each sequence."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How one generation divides the work."""

    dp: int
    zero_stage: int
    micro_batch: int
    accumulation: int
    pp: int = 1
    tp: int = 1
    sp: int = 1
    ep: int = 1
    """Replicas among which the experts are shared out; a divisor of dp."""
    offload: Offload = "none"
    gradient_dtype: GradientDtype = "fp32"
    recompute: Recompute = "none"

    @property
    def world_size(self) -> int:
        """Ranks in the group."""
        return self.dp * self.replica_size

    @property
    def replica_size(self) -> int:
        """Ranks that hold one copy of the model together."""
        return self.pp * self.tp * self.sp

    @property
    def zero_group(self) -> int:
        """Ranks over which ZeRO shards, and gradients are averaged."""
        return self.dp * self.sp

    def place(self, rank: int) -> Place:
        """Where this rank stands."""
        rest, tp = divmod(rank, self.tp)
        rest, sp = divmod(rest, self.sp)
        pp, dp = divmod(rest, self.dp)
        return Place(pp, dp, tp, sp)

    def rank(self, place: Place) -> int:
        """The inverse of `place`."""
        return ((place.pp * self.dp + place.dp) * self.sp + place.sp) * self.tp + place.tp

    @property
    def degrees(self) -> str:
        """In short: dp2 pp2 zero1."""
        split = [f"{name}{degree}" for name in ("pp", "tp", "sp", "ep") if (degree := getattr(self, name)) > 1]
        away = [f"offload-{self.offload}"] if self.offload != "none" else []
        sent = [f"gradients-{self.gradient_dtype}"] if self.gradient_dtype != "fp32" else []
        return " ".join([f"dp{self.dp}", *split, f"zero{self.zero_stage}", *away, *sent])

    @property
    def global_batch(self) -> int:
        """Sequences per step over all ranks."""
        return self.micro_batch * self.accumulation * self.dp

    def __str__(self) -> str:
        return f"{self.degrees} {self.micro_batch}x{self.accumulation}" + RECOMPUTED[self.recompute]

    def to_json(self) -> dict[str, Any]:
        """Plain fields, for journals and manifests; a degree of the model that is 1 goes without saying, and so on."""
        usual = {"pp": 1, "tp": 1, "sp": 1, "ep": 1, "offload": "none", "gradient_dtype": "fp32"}
        usual["recompute"] = "none"
        unsaid = {name for name, value in usual.items() if getattr(self, name) == value}
        return {name: value for name, value in asdict(self).items() if name not in unsaid}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Layout:
        """The inverse of `to_json`. In older journals and manifests `recompute` is true or absent."""
        again = fields.get("recompute", "none")
        return cls(**{**fields, "recompute": RECOMPUTE_OF[again] if isinstance(again, bool) else again})


RECOMPUTED: dict[Recompute, str] = {"none": "", "selective": " recompute-selective", "full": " recompute"}
"""How a layout tells it, in words."""
RECOMPUTE_OF: dict[bool, Recompute] = {False: "none", True: "full"}
"""What true and false mean, as configs may have it and older runs tell it."""


def legal_world_sizes(
    global_batch: int, micro_batch: int, low: int, high: int, replica_size: int = 1, ep: int = 1
) -> tuple[int, ...]:
    """World sizes within [low, high] at which replicas, groups of ep of them, and a step come out whole, ascending."""
    if global_batch % micro_batch:
        return ()
    micro_batches, each = global_batch // micro_batch, replica_size * ep
    first = -(-low // each) * each
    return tuple(n for n in range(first, high + 1, each) if micro_batches % (n // replica_size) == 0)


def plan_layout(
    world_size: int,
    *,
    global_batch: int,
    micro_batch: int,
    zero_stage: int,
    pp: int = 1,
    tp: int = 1,
    sp: int = 1,
    ep: int = 1,
    offload: Offload = "none",
    gradient_dtype: GradientDtype = "fp32",
    recompute: Recompute = "none",
) -> Layout:
    """The layout for this world size; raises ConfigError with the arithmetic when something does not come out whole."""
    size = pp * tp * sp
    dp, rest = divmod(world_size, size)
    if rest or not dp:
        fewer = f"{dp * size} or " if dp else ""
        raise ConfigError(
            f"{world_size} workers are no whole number of replicas: each takes {_product(pp, tp, sp)} = "
            f"{size} workers. Set elastic.max_workers to {fewer}{(dp + 1) * size}, or make parallel.pp, parallel.tp or "
            f"parallel.sp smaller."
        )
    if dp % ep:
        fewer = f"{dp // ep * ep * size} or " if dp > ep else ""
        raise ConfigError(
            f"{dp} replicas can't share the experts in groups of parallel.ep {ep}: {dp} / {ep} = {dp / ep:.4g}. Set "
            f"elastic.max_workers to {fewer}{(dp // ep + 1) * ep * size}, or parallel.ep to a divisor of {dp}."
        )
    if global_batch % micro_batch:
        raise ConfigError(
            f"train.global_batch {global_batch} is not a whole number of micro-batches: {global_batch} / "
            f"train.micro_batch {micro_batch} = {global_batch / micro_batch:g}. Make train.global_batch a multiple of "
            f"{micro_batch}, or change train.micro_batch."
        )
    micro_batches = global_batch // micro_batch
    if micro_batches % dp:
        legal = legal_world_sizes(global_batch, micro_batch, 1, micro_batches * size, size, ep)
        sharing = "worker" if size == 1 else f"replica of {_product(pp, tp, sp)} workers"
        raise ConfigError(
            f"{world_size} workers can't share a step: train.global_batch {global_batch} / train.micro_batch "
            f"{micro_batch} = {micro_batches} micro-batches, and {micro_batches} / {dp} = "
            f"{micro_batches / dp:.4g} a {sharing}. Legal world sizes are {', '.join(map(str, legal)) or 'none'}: set "
            f"elastic.max_workers to one of them, or change train.global_batch."
        )
    return Layout(
        dp,
        zero_stage,
        micro_batch,
        micro_batches // dp,
        pp=pp,
        tp=tp,
        sp=sp,
        ep=ep,
        offload=offload,
        gradient_dtype=gradient_dtype,
        recompute=recompute,
    )


def _product(pp: int, tp: int, sp: int) -> str:
    degrees = {"parallel.pp": pp, "parallel.tp": tp, "parallel.sp": sp}
    return " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1 or name != "parallel.sp")


def micro_batch_ladder(global_batch: int, micro_batch: int, replicas: Sequence[int]) -> tuple[int, ...]:
    """The micro-batch, and what follows each time that memory runs out, down to 1.

    Each is the largest of at most half the one before at which a step still comes out whole with all these numbers of
    replicas (legal at `micro_batch`), so that a run with a smaller micro-batch can be resized just as before.
    """
    ladder = [micro_batch]
    while ladder[-1] > 1:
        half = ladder[-1] // 2
        ladder.append(next(m for m in range(half, 0, -1) if all(global_batch % (m * n) == 0 for n in replicas)))
    return tuple(ladder)
