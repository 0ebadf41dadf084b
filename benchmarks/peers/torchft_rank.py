"""One replica under torchft: its DDP and optimizer wrapper over gloo, as its example train_ddp.py shows it.

A replica that is lost is missed in one step, which is not committed; the others go on, with that much smaller a global
batch. One that comes heals: it copies the state of another while training waits.

    torchrun ... benchmarks/peers/torchft_rank.py job.json         see `notes.Setup`
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
TIMEOUT = timedelta(seconds=30)


def main() -> None:
    """Train until killed."""
    sys.path.insert(0, str(BENCHMARKS))
    from peers.notes import Setup, teller

    setup, replica = Setup.read(sys.argv[1]), int(os.environ["REPLICA_GROUP_ID"])
    import torch
    from plain_ddp import DdpRank
    from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
    from trial import WORLD_SIZE

    from elastictrain.config import TrainConfig

    torch.set_num_threads(1)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        min_replica_size=1,
        load_state_dict=lambda state: training.set_state(state),
        state_dict=lambda: training.state(),
        replica_id=f"replica_{replica}",
        hostname="127.0.0.1",
        timeout=TIMEOUT,
    )
    # its part of the samples is fixed: torchft does not know how many replicas there will be
    training = DdpRank(
        TrainConfig.from_dict(setup.config),
        Path(setup.data_folder),
        replica,
        WORLD_SIZE,
        wrap=lambda module: DistributedDataParallel(manager, module),
        manage=lambda optimizer: Optimizer(manager, optimizer),
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
