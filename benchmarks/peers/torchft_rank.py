"""One replica under torchft: its manager and optimizer wrapper over gloo.

A replica that is lost is missed in one step, which is not committed; the others go on, with that much smaller a global
batch. One that comes heals: it copies the state of another while training waits. Gradients are averaged by the
manager's `allreduce`, in one bucket. torchft's DistributedDataParallel would do it in the backward pass, but in 0.2.0
over gloo it ends the survivors too: `_comm_hook` asserts `fut._fut`, which is not set when the collective raised.

    torchrun ... benchmarks/peers/torchft_rank.py job.json         see `notes.Setup`
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
TIMEOUT = timedelta(seconds=30)


def main() -> None:
    """Train until killed."""
    sys.path.insert(0, str(BENCHMARKS))
    from peers.notes import Setup, teller

    setup, replica = Setup.read(sys.argv[1]), int(os.environ["REPLICA_GROUP_ID"])
    import torch
    from plain_ddp import DdpRank
    from torch import nn
    from torchft import Manager, Optimizer, ProcessGroupGloo
    from trial import WORLD_SIZE

    from elastictrain.config import TrainConfig

    torch.set_num_threads(1)
    training: DdpRank
    manager = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        min_replica_size=1,
        load_state_dict=lambda state: training.set_state(state),
        state_dict=lambda: training.state(),
        replica_id=f"replica_{replica}",
        hostname="127.0.0.1",
        timeout=TIMEOUT,
    )

    class Replica(nn.Module):
        """Averages nothing by itself, so that there is nothing to leave out."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.no_sync = module, nullcontext

        def forward(self, *inputs: Any) -> Any:
            return self.module(*inputs)

    def average(module: nn.Module) -> None:
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        bucket = torch.cat([gradient.flatten() for gradient in gradients])
        manager.allreduce(bucket).wait()
        parts = bucket.split([gradient.numel() for gradient in gradients])  # type: ignore[no-untyped-call]  # torch's
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    # its part of the samples is fixed: torchft does not know how many replicas there will be
    training = DdpRank(
        TrainConfig.from_dict(setup.config),
        Path(setup.data_folder),
        replica,
        WORLD_SIZE,
        wrap=Replica,
        manage=lambda optimizer: Optimizer(manager, optimizer),
        reduce=average,
    )
    training.begin(1)
    tell = teller(setup.events, replica, WORLD_SIZE)
    tell("loop")
    while True:
        before = manager.current_step()
        training.step(before + 1)
        if manager.current_step() > before:
            # torchft has no public name for the quorum that a step was done in
            tell("step", manager.current_step(), world_size=manager.num_participants(), group=manager._quorum_id)


if __name__ == "__main__":
    main()
