"""What a run's workers cost, from the ledger and the price that its config has (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastictrain.tracking.ledger import Goodput

_US_PER_HOUR = 3.6e9


def price_of(config: Mapping[str, Any]) -> float | None:
    """`cluster.worker_cost_per_hour` of a config as an event has it; None where there is none."""
    price = (config.get("cluster") or {}).get("worker_cost_per_hour")
    return float(price) if isinstance(price, int | float) else None


def cost_of(price: float | None, ledger: Goodput) -> float | None:
    """Of all time but that in which nobody ran the run, in the currency of `price`; None without one."""
    if price is None:
        return None
    return price * sum(us for bucket, us in ledger.workers_us.items() if bucket != "down") / _US_PER_HOUR
