"""The same training with torch's DistributedDataParallel: what data-parallel peers run, one rank of it.

Model, loss, optimizer, clipping, token shards, sample order and learning rate are elastictrain's own. No state is
sharded: each rank has all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from plain_model import plain_model
from torch import nn
from torch.optim import Optimizer

from elastictrain.config import TrainConfig
from elastictrain.data.manifest import Manifest
from elastictrain.data.order import SampleOrder, dropout_seed
from elastictrain.data.samples import TextSamples
from elastictrain.data.shards import TokenShards
from elastictrain.data.stream import SampleStream
from elastictrain.engine.schedule import learning_rate
from elastictrain.engine.zero_config import adamw
from elastictrain.workloads import build_workload

STATE_FILE = "state.pt"


class DdpRank:
    """One rank. `wrap` makes the module data-parallel, `manage` wraps the optimizer.

    Whose `wrap` does not average gradients in the backward pass does so in `reduce`, which comes after it.
    """

    def __init__(
        self,
        config: TrainConfig,
        data_folder: Path,
        rank: int,
        world_size: int,
        wrap: Callable[[nn.Module], Any] = nn.parallel.DistributedDataParallel,
        manage: Callable[[Optimizer], Any] = lambda optimizer: optimizer,
        reduce: Callable[[nn.Module], None] = lambda module: None,
    ) -> None:
        manifest = Manifest.load(data_folder)
        self._config, self._rank, self._reduce = config, rank, reduce
        self._layout = config.layout(world_size)
        self._samples = TextSamples(TokenShards(manifest))
        self._workload = build_workload(config, manifest.vocab_size)
        self._module = plain_model(self._workload, config)
        self._wrap = wrap
        self._model = self._parallel(self._module)
        self._adamw = adamw(self._workload, config.train, dict(self._module.named_parameters()))
        self._optimizer = manage(self._adamw)

    def begin(self, first_step: int) -> None:
        """Read from this step on."""
        order = SampleOrder(len(self._samples), self._config.train.seed)
        self._stream = SampleStream(self._samples, order, self._layout, self._rank, first_step)

    def step(self, step: int) -> list[float]:
        """One optimizer step; the loss of each of this rank's micro-batches."""
        train = self._config.train
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate(train, step)
        self._optimizer.zero_grad()
        losses = []
        micro_batches = next(self._stream)
        for number, (micro_batch, batch) in enumerate(micro_batches, 1):
            torch.manual_seed(dropout_seed(train.seed, step, micro_batch.global_index))
            with nullcontext() if number == len(micro_batches) else self._silently():
                loss = self._workload.loss(self._model, batch)
                (loss / len(micro_batches)).backward()  # type: ignore[no-untyped-call]  # torch's
            losses.append(loss.detach())
        self._reduce(self._module)
        if train.grad_clip:
            nn.utils.clip_grad_norm_(self._module.parameters(), train.grad_clip)
        self._optimizer.step()
        return torch.stack(losses).tolist()

    def _parallel(self, module: nn.Module) -> Any:
        return self._wrap(module)

    def _silently(self) -> AbstractContextManager[None]:
        """Backward passes in it add up gradients of this rank alone."""
        silent: AbstractContextManager[None] = self._model.no_sync()
        return silent

    def save(self, folder: str) -> None:
        """Rank 0 writes all of the state: it is the same on every rank."""
        if self._rank == 0:
            torch.save(self.state(), Path(folder, STATE_FILE))

    def load(self, folder: str) -> None:
        """Inverse of `save`, at any world size."""
        self.set_state(torch.load(Path(folder, STATE_FILE), weights_only=True))

    def state(self) -> dict[str, Any]:
        """Weights and moments."""
        return {"model": self._module.state_dict(), "optimizer": self._adamw.state_dict()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        self._module.load_state_dict(state["model"])
        self._adamw.load_state_dict(state["optimizer"])
