"""The user's config as the state machine's policy (pure)."""

from __future__ import annotations

from elastictrain.config import TrainConfig
from elastictrain.control.budget import Budgets
from elastictrain.control.state import Policy
from elastictrain.plan.auto import Plans


def policy_of(config: TrainConfig, plans: Plans, on_gpus: bool) -> Policy:
    """What the state machine may do; `plans` begin with the one in force."""
    elastic = config.elastic
    return Policy(
        steps=config.train.steps,
        plans=plans,
        standby=elastic.standby,
        budgets=Budgets.of(elastic),
        replace_timeout_s=elastic.replace_timeout_s,
        wait_timeout_s=elastic.wait_timeout_s,
        unreserved_standby=not on_gpus,
    )
