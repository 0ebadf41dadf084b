"""The user's config as the state machine's policy (pure)."""

from __future__ import annotations

from elastictrain.config import TrainConfig
from elastictrain.control.budget import Budgets
from elastictrain.control.state import Policy
from elastictrain.plan.layout import legal_world_sizes, micro_batch_ladder


def policy_of(config: TrainConfig, micro_batch: int, on_gpus: bool) -> Policy:
    """What the state machine may do; `micro_batch` is the one in force, train.micro_batch or less."""
    elastic, train = config.elastic, config.train
    replica = config.parallel.replica_size
    sizes = legal_world_sizes(train.global_batch, train.micro_batch, elastic.min_workers, elastic.max_workers, replica)
    ladder = micro_batch_ladder(train.global_batch, train.micro_batch, [size // replica for size in sizes])
    return Policy(
        steps=train.steps,
        world_sizes=sizes,
        standby=elastic.standby,
        budgets=Budgets.of(elastic),
        replace_timeout_s=elastic.replace_timeout_s,
        wait_timeout_s=elastic.wait_timeout_s,
        unreserved_standby=not on_gpus,
        neighbours=config.parallel.tp * config.parallel.sp,
        micro_batches=tuple(m for m in ladder if m <= micro_batch),
    )
