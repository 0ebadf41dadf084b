"""Expert parallelism: ep neighbouring replicas hold the experts of each layer together, all else each by itself.

    groups     ep ranks exchange tokens by all-to-all, each with the same stage and share of matrices; the dp / ep ranks
               at the same place of such groups hold the same experts, and ZeRO shards their state among these alone
    gradients  an expert has those of all tokens of its ep ranks, so their sum over its dp / ep ranks, divided by dp, is
               what ep 1 would give; DeepSpeed divides so, and counts each expert once in the norm
    state      experts keep their number in the whole model, so theirs are logical tensors as under any other layout

DeepSpeed's handling of experts is used, and none of its layers: it knows a parameter of an expert by `allreduce` and
`group_name`, and that there are any by a module of its class `MoE`.

Cost of a build in a warm process: the groups, 10 to 30 ms, beside the workload's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor, nn

from elastictrain.config import TrainConfig
from elastictrain.engine.group import RankGroup
from elastictrain.engine.pipeline import PipelineEngine
from elastictrain.engine.split import SplitEngine
from elastictrain.engine.witness import Replicas
from elastictrain.engine.zero import ZeroEngine
from elastictrain.engine.zero_state import Piece, share
from elastictrain.plan.layout import Place
from elastictrain.plan.part import part_of
from elastictrain.workloads.base import SplitWorkload
from elastictrain.workloads.experts import Exchange


class SharedExperts(ZeroEngine):
    """What an engine does otherwise when its rank shares experts with others: to be put before the engine's class."""

    _workload: SplitWorkload  # the config has no experts for others

    def _exchange(self, group: RankGroup) -> Exchange:
        from deepspeed.utils import groups

        # DeepSpeed would make groups for experts that tensor parallelism does not split
        name, layout, me = self._group_name, self._layout, group.rank
        for place in (Place(pp, 0, tp) for pp in range(layout.pp) for tp in range(layout.tp)):
            alike = [layout.rank(replace(place, dp=dp)) for dp in range(layout.dp)]
            for first in range(0, layout.dp, layout.ep):
                sharing = alike[first : first + layout.ep]
                made = dist.new_group(sharing)
                if me in sharing:
                    self._sharing = groups._EXPERT_PARALLEL_GROUP[name] = made
                    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = sharing
            for first in range(layout.ep):
                holders = alike[first :: layout.ep]
                made = dist.new_group(holders)
                if me in holders:
                    self._holders = frozenset(holders)
                    groups._EXPERT_DATA_PARALLEL_GROUP[name] = made
                    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = holders
        group.know_connections()
        return Exchange(self._swap)

    def _mark_experts(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if self._workload.is_expert(name):
                parameter.allreduce, parameter.group_name = False, self._group_name  # type: ignore[attr-defined]  # DeepSpeed's
        module.add_module("has_experts", _marker())

    @property
    def _group_name(self) -> str:
        return f"ep_size_{self._layout.ep}"

    def _share(self, pieces: Iterable[Piece]) -> tuple[Piece, ...]:
        pieces = tuple(pieces)
        experts = [piece for piece in pieces if self._workload.is_expert(piece.parameter)]
        others = [piece for piece in pieces if not self._workload.is_expert(piece.parameter)]
        layout = self._layout
        mine = share(experts, self._place.dp // layout.ep, layout.dp // layout.ep)
        return *share(others, self._place.dp, layout.dp), *mine

    def _replicas(self) -> tuple[Sequence[Replicas], int]:
        layout, place, whole = self._layout, self._place, self._found.whole
        experts = {name: weight for name, weight in whole.items() if self._workload.is_expert(name)}
        others = {name: weight for name, weight in whole.items() if name not in experts}
        each = 1 + layout.ep  # sets of ranks that hold the same of this part: all for the others, some for each expert
        first = (place.pp * layout.tp + place.tp) * each
        same = frozenset(layout.rank(replace(place, dp=dp)) for dp in range(layout.dp))
        found = [Replicas(first, same, others)]
        if layout.dp > layout.ep:
            found.append(Replicas(first + 1 + place.dp % layout.ep, self._holders, experts))
        return found, layout.pp * layout.tp * each

    def _squares(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        experts = [gradient for name, gradient in gradients.items() if self._workload.is_expert(name)]
        others = [gradient for name, gradient in gradients.items() if not self._workload.is_expert(name)]
        squares = nn.utils.get_total_norm(experts).square()
        dist.all_reduce(squares, group=self._sharing)
        return squares + nn.utils.get_total_norm(others).square()

    def _swap(self, x: Tensor) -> Tensor:
        received = x.new_empty(x.shape)
        dist.all_to_all_single(received, x.contiguous(), group=self._sharing)
        return received


class ExpertEngine(SharedExperts):
    """One rank of which each has the whole model but for experts; see `base.Engine` for the contract."""

    def _build_module(self, config: TrainConfig, group: RankGroup) -> nn.Module:
        exchange = self._exchange(group)
        part = part_of(self._workload.shape, self._layout, group.rank)
        module = self._with_memory(self._workload.build_part(self._seed, part, exchange=exchange))
        self._mark_experts(module)
        return module

    def _whole_shapes(self, parameters: Mapping[str, Tensor]) -> Mapping[str, tuple[int, ...]]:
        return self._workload.parameter_shapes

    def _clip_gradients(self, most: float) -> float:
        parameters = {name: p for name, p in self._module.named_parameters() if p.grad is not None}
        norm = self._squares(parameters).sqrt()
        nn.utils.clip_grads_with_norm_(parameters.values(), most, norm)
        return float(norm)


class ExpertSplitEngine(SharedExperts, SplitEngine):
    """One rank under tensor parallelism; see `base.Engine` for the contract."""


class ExpertPipelineEngine(SharedExperts, PipelineEngine):
    """One rank of a pipeline; see `base.Engine` for the contract."""


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
