"""The same training with the Trainer of Hugging Face's transformers, one rank of it: DDP, driven by accelerate.

Model, loss, optimizer groups, samples, batch sizes and clipping are the same; the loop, the loading of batches, the
reduction and all bookkeeping are Trainer's, with what it writes and logs switched off. accelerate need not be in the
environment: `pip install --no-deps --target FOLDER accelerate`, and FOLDER in PYTHONPATH.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plain_model import plain_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from elastictrain.config import TrainConfig
from elastictrain.data.manifest import Manifest
from elastictrain.data.order import SampleOrder
from elastictrain.data.samples import TextSamples
from elastictrain.data.shards import TokenShards
from elastictrain.engine.schedule import learning_rate
from elastictrain.engine.zero_config import adamw
from elastictrain.workloads import build_workload

NEVER_ENDING = 1_000_000


class TrainerRank:
    """One rank. Trainer finds it in the environment, and makes the process group itself."""

    def __init__(self, config: TrainConfig, data_folder: Path, rank: int, world_size: int, master_port: int) -> None:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(master_port),
            "ACCELERATE_USE_CPU": str(not torch.cuda.is_available()).lower(),
        }
        self._config, self._world_size = config, world_size
        manifest = Manifest.load(data_folder)
        self._samples = TextSamples(TokenShards(manifest))
        self._workload = build_workload(config, manifest.vocab_size)
        self._folder = data_folder

    def train(self, ended: Callable[[], None]) -> None:
        """For ever; calls `ended` after each optimizer step."""
        from transformers import Trainer, TrainerCallback, TrainingArguments

        config = self._config
        layout = config.layout(self._world_size)
        module = plain_model(self._workload, config)
        optimizer = adamw(self._workload, config.train, dict(module.named_parameters()))
        for group in optimizer.param_groups:
            group["lr"] = 1.0
        schedule = LambdaLR(optimizer, lambda step: learning_rate(config.train, step + 1))

        class Told(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                ended()

        arguments = TrainingArguments(
            output_dir=str(self._folder / "trainer"),
            per_device_train_batch_size=layout.micro_batch,
            gradient_accumulation_steps=layout.accumulation,
            max_steps=NEVER_ENDING,
            max_grad_norm=config.train.grad_clip or 0.0,
            use_cpu=not torch.cuda.is_available(),
            bf16=config.train.dtype == "bf16",
            seed=config.train.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            ddp_find_unused_parameters=False,
        )
        Trainer(
            model=_Told(module, self._workload),
            args=arguments,
            train_dataset=_Samples(self._samples, config.train.seed),
            data_collator=lambda samples: {name: torch.stack([s[name] for s in samples]) for name in samples[0]},
            optimizers=(optimizer, schedule),
            callbacks=[Told()],
        ).train()


class _Told(nn.Module):
    """The module with its loss inside, as Trainer wants it."""

    def __init__(self, module: nn.Module, workload: Any) -> None:
        super().__init__()
        self.module, self._workload = module, workload

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self._workload.loss(self.module, batch)}


class _Samples(Dataset[dict[str, Tensor]]):
    """In elastictrain's order."""

    def __init__(self, samples: TextSamples, seed: int) -> None:
        self._samples, self._order = samples, SampleOrder(len(samples), seed)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        batch = self._samples.read([self._order.sample(position)])
        return {name: tensor[0] for name, tensor in batch.items()}
