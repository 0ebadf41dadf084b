"""A workload of yours in a few lines: say how the module is made and what its loss is. The rest has an answer here.

    class Digits(OwnWorkload):
        def create(self):
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

        def loss(self, module, batch):
            return F.cross_entropy(module(batch["image"]), batch["digit"])

`model.kind: own` and `model.workload: digits.py:Digits` train it; it is called with the run's config. What its batches
hold is `data.samples`' to say, or, without that, the corpus': `tokens`.

All state has to be in parameters: buffers, such as the running means of a batch norm, are in no snapshot. Random
numbers have to be torch's own, from its default generator: it is seeded for each micro-batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from elastictrain.config import TrainConfig
from elastictrain.errors import ConfigError
from elastictrain.workloads.base import Batch, Workload
from elastictrain.workloads.named import load_named, theirs

_NEEDED = ("build", "outline", "loss", "take_gauges", "decays", "num_tokens", "evaluate", "generate")


class OwnWorkload(ABC):
    """A Workload but for two methods."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @abstractmethod
    def create(self) -> nn.Module:
        """A new fp32 module on the CPU. torch's default generator is seeded; use no other source of randomness."""

    @abstractmethod
    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Mean loss over the micro-batch, a scalar. Call `module`, which an engine may have wrapped."""

    def build(self, seed: int) -> nn.Module:
        """See `base.Workload.build`; torch's global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.create().float().train()

    def outline(self) -> nn.Module:
        """See `base.Workload.outline`; as `build`, since only you know what else your module draws."""
        return self.build(self.config.train.seed)

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Matrices and kernels decay; norms and biases, which are vectors, don't."""
        return parameter.ndim >= 2

    def take_gauges(self) -> Mapping[str, float]:
        """Nothing; or what else the losses since the last call showed, always by the same names: metrics of a step."""
        return {}

    def num_tokens(self, batch: Batch) -> int:
        """What speed is counted in: samples, unless you say otherwise."""
        return len(next(iter(batch.values())))

    def evaluate(self, module: nn.Module, batch: Batch) -> tuple[float, int]:
        """The loss as a sum, and what it is the mean of after division: `num_tokens`."""
        was_training = module.training
        module.eval()
        try:
            with torch.no_grad():
                count = self.num_tokens(batch)
                return float(self.loss(module, batch)) * count, count
        finally:
            module.train(was_training)

    def generate(self, module: nn.Module, prompt: list[int], num_tokens: int, seed: int) -> list[int]:
        """Nothing: not every model writes."""
        return []


def own_workload(config: TrainConfig) -> Workload:
    """What `model.workload` makes of the config; raises ConfigError when that is no Workload."""
    named = str(config.model.workload)
    factory = load_named("model.workload", named)
    with theirs(f"model.workload {named} can't be called with the config"):
        workload: Workload = factory(config)
    if missing := [name for name in _NEEDED if not callable(getattr(workload, name, None))]:
        raise ConfigError(
            f"model.workload {named} makes a {type(workload).__name__} without {', '.join(missing)}: derive it from "
            "elastictrain.workloads.own.OwnWorkload, or give it all of elastictrain.workloads.base.Workload"
        )
    return workload
