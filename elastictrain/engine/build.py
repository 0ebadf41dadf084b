"""The engine of a layout: plain ZeRO, shared sequences, tensor parallelism, a pipeline's stage; with shared experts."""

from __future__ import annotations

from elastictrain.config import TrainConfig
from elastictrain.engine.device import prepare_process
from elastictrain.engine.experts import ExpertEngine, ExpertPipelineEngine, ExpertSplitEngine
from elastictrain.engine.failures import peer_loss_named
from elastictrain.engine.group import RankGroup
from elastictrain.engine.pipeline import PipelineEngine
from elastictrain.engine.reset import forget_engine
from elastictrain.engine.sequence import SequenceEngine
from elastictrain.engine.split import SplitEngine
from elastictrain.engine.zero import ZeroEngine
from elastictrain.plan.layout import Layout
from elastictrain.workloads.base import Workload


def build_engine(
    workload: Workload, config: TrainConfig, layout: Layout, group: RankGroup, *, loads_next: bool = False
) -> ZeroEngine:
    """The engine of this rank, initialised from `config.train.seed`; all ranks of the formed group call it together.

    `loads_next` promises that a state is imported before the first step, so that nothing need be initialised.
    Raises PeerLostError when one of them goes away meanwhile.
    """
    device = prepare_process()
    with peer_loss_named():
        try:
            return _kind(layout)(workload, config, layout, group, device, loads_next=loads_next)
        except BaseException:
            forget_engine()
            raise


def _kind(layout: Layout) -> type[ZeroEngine]:
    if layout.pp > 1:
        return ExpertPipelineEngine if layout.ep > 1 else PipelineEngine
    if layout.tp > 1:
        return ExpertSplitEngine if layout.ep > 1 else SplitEngine
    if layout.sp > 1:
        return SequenceEngine
    return ExpertEngine if layout.ep > 1 else ZeroEngine
