"""A workload whose loss planned faults may spoil."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from elastictrain.workloads.base import Batch, SplitWorkload, Workload


class SpoiledWorkload:
    """All of the workload, but a loss is NaN when `due()` says so."""

    def __init__(self, workload: Workload, due: Callable[[], bool]) -> None:
        self._workload, self._due = workload, due

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """See `workloads.base.Workload.loss`."""
        loss = self._workload.loss(module, batch)
        return loss * math.nan if self._due() else loss

    def output_loss(self, module: nn.Module, output: Tensor, batch: Batch) -> Tensor:
        """See `workloads.base.SplitWorkload.output_loss`."""
        loss = cast(SplitWorkload, self._workload).output_loss(module, output, batch)
        return loss * math.nan if self._due() else loss

    def __getattr__(self, name: str) -> Any:
        return getattr(self._workload, name)
