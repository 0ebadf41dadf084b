"""Where each ZeRO stage keeps master weights and moments, as fragments of logical tensors.

Every stage ends in the same shape: torch's AdamW updates a few flat fp32 *masters*, each with its two moments beside
it, and each master holds pieces of parameters at offsets of its own.

    stage 0       the parameters themselves (fp32) or their fp32 copies (bf16), whole on every rank
    stage 1, 2    one partition of each group's concatenated parameters (`single_partition_of_fp32_groups`)
    stage 1 bf16  the same, under BF16_Optimizer (`fp32_groups_flat_partition`)
    stage 3       a padded 1/dp slice of every parameter, concatenated (`fp32_partitioned_groups_flat`)

`find_pieces` is the only code that knows this. Padding belongs to no piece. Cost: microseconds a parameter, no copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elastictrain.state.tensors import PARTS


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, start + numel) of a parameter, at `offset` of the flat master and of its moments."""

    parameter: str
    start: int
    numel: int
    master: Tensor
    offset: int

    def view(self, part: str, moments: Mapping[Tensor, Mapping[str, Tensor]]) -> Tensor:
        """These elements of `param`, `exp_avg` or `exp_avg_sq`, flat, not copied."""
        whole = self.master if part == PARTS[0] else moments[self.master][part]
        return whole.detach().view(-1).narrow(0, self.offset, self.numel)


@dataclass(frozen=True, slots=True)
class Found:
    """A rank's pieces, and how its low-precision or gathered weights follow from them."""

    pieces: tuple[Piece, ...]
    replicated: bool
    """Whether every rank holds all of the state (stage 0), not a part of its own."""
    refresh: Callable[[], None]
    """Collective: recompute the weights that forward uses from the masters, after these were overwritten."""
    whole: Mapping[str, Tensor]
    """The weights that every rank holds whole between two updates, by name."""
    own_weights: Callable[[Piece], Tensor]
    """The weights of a piece that forward uses, flat, not copied."""


def find_pieces(optimizer: Any, named: Mapping[str, nn.Parameter]) -> Found:
    """The pieces of this rank, of these trainable parameters; `optimizer` is what DeepSpeed made of torch's."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    def weights(piece: Piece) -> Tensor:
        return named[piece.parameter].detach().view(-1).narrow(0, piece.start, piece.numel)

    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        names = {id(p): name for name, p in named.items()}
        kept = {names[id(p)]: p for p in optimizer.persistent_parameters if id(p) in names}
        pieces = tuple(_stage_3(optimizer, names))
        return Found(pieces, False, lambda: _refresh_stage_3(optimizer), kept, lambda p: _partition(named, p))
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        masters = optimizer.single_partition_of_fp32_groups
        return Found(tuple(_partitions(named, masters)), False, optimizer.update_lp_params, named, weights)
    if isinstance(optimizer, BF16_Optimizer):
        masters = optimizer.fp32_groups_flat_partition
        return Found(tuple(_partitions(named, masters)), False, optimizer.update_lp_params, named, weights)
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        copies = {
            id(low): high
            for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            for low, high in zip(lows, highs, strict=True)
        }
        whole = tuple(Piece(name, 0, p.numel(), copies[id(p)], 0) for name, p in named.items())
        return Found(whole, True, lambda: _refresh_copies(named, copies), named, weights)
    whole = tuple(Piece(name, 0, p.numel(), p, 0) for name, p in named.items())
    return Found(whole, True, lambda: None, named, weights)


def share(pieces: Iterable[Piece], rank: int, world_size: int) -> tuple[Piece, ...]:
    """One rank's equal share of pieces that every rank holds."""
    pieces = tuple(pieces)
    total = sum(p.numel for p in pieces)
    low, high = total * rank // world_size, total * (rank + 1) // world_size
    mine, position = [], 0
    for p in pieces:
        start, stop = max(low - position, 0), min(high - position, p.numel)
        if start < stop:
            mine.append(Piece(p.parameter, p.start + start, stop - start, p.master, p.offset + start))
        position += p.numel
    return tuple(mine)


def start_moments(optimizer: torch.optim.Optimizer, pieces: tuple[Piece, ...], step: int) -> None:
    """Give every master moments, zero where it has none yet, and the update count `step`.

    Torch makes them in the first update; a state that can be exported and imported at any step needs them now.
    """
    for master in {id(p.master): p.master for p in pieces}.values():
        state = optimizer.state[master]
        for part in PARTS[1:]:
            if part not in state:
                state[part] = torch.zeros_like(master, memory_format=torch.preserve_format).detach()
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=master.device)


def _partitions(named: Mapping[str, Tensor], masters: list[Tensor]) -> Iterator[Piece]:
    # A parameter lies in at most one group, and a rank's partition holds at most one range of it.
    for name, parameter in named.items():
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
        if mapping is None:
            continue
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield Piece(name, low.start, low.numel, masters[mapping.param_group_index], high.start)


def _stage_3(optimizer: Any, names: Mapping[int, str]) -> Iterator[Piece]:
    for master, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        offset = 0
        for parameter in group:
            slice_numel = parameter.partition_numel()
            start = slice_numel * optimizer._get_param_partition_rank(parameter)
            numel = min(slice_numel, parameter.ds_numel - start)
            if numel > 0:
                yield Piece(names[id(parameter)], start, numel, master, offset)
            offset += slice_numel


def _partition(named: Mapping[str, Tensor], piece: Piece) -> Tensor:
    mine: Tensor = named[piece.parameter].ds_tensor  # type: ignore[attr-defined]  # DeepSpeed's
    return mine.detach().view(-1).narrow(0, 0, piece.numel)


def _refresh_stage_3(optimizer: Any) -> None:
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    # Small parameters stay gathered on every rank between steps: give the stale copies up, then gather anew.
    persistent = optimizer.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


@torch.no_grad()
def _refresh_copies(named: Mapping[str, Tensor], copies: Mapping[int, Tensor]) -> None:
    for parameter in named.values():
        parameter.copy_(copies[id(parameter)])
