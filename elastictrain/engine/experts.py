"""Expert parallelism: ep neighbouring ranks hold the experts of each layer together, everything else each by itself.

    groups     ep ranks exchange tokens by all-to-all; the dp / ep ranks at the same place of such groups hold the same
               experts, and ZeRO shards their state among these alone
    gradients  an expert has those of all tokens of its ep ranks, so their sum over its dp / ep ranks, divided by dp, is
               what ep 1 would give; DeepSpeed divides so, and counts each expert once in the norm
    state      experts keep their number in the whole model, so theirs are logical tensors as under any other layout

DeepSpeed's handling of experts is used, and none of its layers: it knows a parameter of an expert by `allreduce` and
`group_name`, and that there are any by a module of its class `MoE`.

Cost of a build in a warm process: the groups, 10 to 30 ms, beside the workload's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor, nn

from elastictrain.config import TrainConfig
from elastictrain.engine.group import RankGroup
from elastictrain.engine.witness import Replicas
from elastictrain.engine.zero import ZeroEngine
from elastictrain.engine.zero_state import Piece, share
from elastictrain.plan.part import part_of
from elastictrain.workloads.base import SplitWorkload
from elastictrain.workloads.experts import Exchange


class ExpertEngine(ZeroEngine):
    """One rank that shares experts with others; see `base.Engine` for the contract."""

    _workload: SplitWorkload  # the config has no experts for others

    def _build_module(self, config: TrainConfig, group: RankGroup) -> nn.Module:
        from deepspeed.utils import groups

        workload, ep = self._workload, self._layout.ep
        groups._create_expert_and_data_parallel(ep)
        group.know_connections()
        name = f"ep_size_{ep}"
        self._sharing = groups._get_expert_parallel_group(name)
        self._holders = frozenset(groups._get_expert_data_parallel_group_ranks(name))
        part = part_of(workload.shape, self._layout, group.rank)
        module = self._with_memory(workload.build_part(self._seed, part, exchange=Exchange(self._swap)))
        for parameter_name, parameter in module.named_parameters():
            if workload.is_expert(parameter_name):
                parameter.allreduce, parameter.group_name = False, name  # type: ignore[attr-defined]  # DeepSpeed's
        module.add_module("has_experts", _marker())
        return module

    def _whole_shapes(self, parameters: Mapping[str, Tensor]) -> Mapping[str, tuple[int, ...]]:
        return self._workload.parameter_shapes

    def _share(self, pieces: Iterable[Piece]) -> tuple[Piece, ...]:
        pieces = tuple(pieces)
        experts = [piece for piece in pieces if self._workload.is_expert(piece.parameter)]
        others = [piece for piece in pieces if not self._workload.is_expert(piece.parameter)]
        layout = self._layout
        mine = share(experts, self._place.dp // layout.ep, layout.dp // layout.ep)
        return *share(others, self._place.dp, layout.dp), *mine

    def _replicas(self) -> tuple[Sequence[Replicas], int]:
        layout, whole = self._layout, self._found.whole
        others = {name: weight for name, weight in whole.items() if not self._workload.is_expert(name)}
        found = [Replicas(0, frozenset(range(layout.dp)), others)]
        if layout.dp > layout.ep:
            experts = {name: weight for name, weight in whole.items() if self._workload.is_expert(name)}
            found.append(Replicas(1 + self._place.dp % layout.ep, self._holders, experts))
        return found, 1 + layout.ep

    def _clip_gradients(self, most: float) -> float:
        named = {name: p for name, p in self._module.named_parameters() if p.grad is not None}
        experts = [p.grad for name, p in named.items() if self._workload.is_expert(name)]
        others = [p.grad for name, p in named.items() if not self._workload.is_expert(name)]
        squares = nn.utils.get_total_norm([g for g in experts if g is not None]).square()
        dist.all_reduce(squares, group=self._sharing)
        norm = (squares + nn.utils.get_total_norm([g for g in others if g is not None]).square()).sqrt()
        nn.utils.clip_grads_with_norm_(named.values(), most, norm)
        return float(norm)

    def _swap(self, x: Tensor) -> Tensor:
        received = x.new_empty(x.shape)
        dist.all_to_all_single(received, x.contiguous(), group=self._sharing)
        return received


def _marker() -> nn.Module:
    from deepspeed.moe.layer import MoE

    class HasExperts(MoE):  # type: ignore[misc]  # DeepSpeed is not typed
        """Nothing but its class."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = 0

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """The groups are there."""

    return HasExperts()
