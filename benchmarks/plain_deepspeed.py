"""The same training without this platform: DeepSpeed used as its documentation shows it, one rank of it.

Model, loss, optimizer, DeepSpeed's config, token shards, sample order, learning rate and dropout seeds are
elastictrain's own, so that whoever runs this does exactly the same arithmetic. The loop is the plain one: forward,
backward, step for each micro-batch. No copies of the state, no order to stop, no watching.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from plain_model import plain_model

from elastictrain.config import TrainConfig
from elastictrain.data.manifest import Manifest
from elastictrain.data.order import SampleOrder, dropout_seed
from elastictrain.data.samples import TextSamples
from elastictrain.data.shards import TokenShards
from elastictrain.data.stream import SampleStream
from elastictrain.engine.device import prepare_process
from elastictrain.engine.schedule import learning_rate
from elastictrain.engine.zero_config import adamw, deepspeed_config
from elastictrain.workloads import build_workload

TAG = "state"
"""Of DeepSpeed's checkpoints: a folder within the folder."""


class PlainRank:
    """One rank. The process group exists already; `engine` is DeepSpeed's."""

    def __init__(self, config: TrainConfig, data_folder: Path, rank: int, world_size: int) -> None:
        import deepspeed

        device = prepare_process(lean=False)
        deepspeed.init_distributed(dist_backend=device.backend, auto_mpi_discovery=False)
        manifest = Manifest.load(data_folder)
        self._config, self._rank = config, rank
        self._layout = config.layout(world_size)
        self._samples = TextSamples(TokenShards(manifest))
        self._workload = build_workload(config, manifest.vocab_size)
        module = plain_model(self._workload, config)
        parameters = dict(module.named_parameters())
        self._optimizer = adamw(self._workload, config.train, parameters)
        num_elements = sum(p.numel() for p in parameters.values())
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self._optimizer,
            config=deepspeed_config(config.train, self._layout, device, num_elements),
            dist_init_required=False,
        )

    def begin(self, first_step: int) -> None:
        """Read from this step on."""
        order = SampleOrder(len(self._samples), self._config.train.seed)
        self._stream = SampleStream(self._samples, order, self._layout, self._rank, first_step)

    def step(self, step: int) -> list[float]:
        """One optimizer step; the loss of each of this rank's micro-batches."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._config.train, step)
        losses = []
        for micro_batch, batch in next(self._stream):
            torch.manual_seed(dropout_seed(self._config.train.seed, step, micro_batch.global_index))
            loss = self._workload.loss(self.engine, batch)
            losses.append(loss.detach())
            self.engine.backward(loss)
            self.engine.step()
        return torch.stack(losses).tolist()

    def save(self, folder: str) -> None:
        """DeepSpeed's own checkpoint: each rank writes its part."""
        self.engine.save_checkpoint(folder, tag=TAG)

    def load(self, folder: str) -> None:
        """Inverse of `save`, at the same world size."""
        self.engine.load_checkpoint(folder, tag=TAG)

    def close(self) -> None:
        """End the stream's thread."""
        self._stream.close()
