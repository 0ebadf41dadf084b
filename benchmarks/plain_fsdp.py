"""The same training with torch's FSDP2 (`fully_shard`), one rank of it: all state sharded, as ZeRO 3 does.

Each layer is a unit of its own, as torch's documentation shows it. All else is plain_ddp.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from plain_ddp import DdpRank
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from elastictrain.engine.device import current_device


class FsdpRank(DdpRank):
    """One rank; the process group exists already."""

    def _parallel(self, module: nn.Module) -> Any:
        mesh = init_device_mesh(current_device().torch_device.type, (self._layout.dp,))
        for layers in (m for m in module.modules() if isinstance(m, nn.ModuleList)):
            for layer in layers:
                fully_shard(layer, mesh=mesh)
        return fully_shard(module, mesh=mesh)

    @contextmanager
    def _silently(self) -> Iterator[None]:
        self._model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._model.set_requires_gradient_sync(True)
