"""One rank under torchrun elastic: DDP over gloo, and a checkpoint of rank 0 every few steps, as its tutorial shows it.

When a rank ends or an agent comes or goes, torchrun ends all ranks and starts them again, and they go on from the
newest checkpoint.

    torchrun ... benchmarks/peers/torchrun_rank.py job.json         see `notes.Setup`
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
STEP_FILE = "step.json"


def main() -> None:
    """Train until killed."""
    sys.path.insert(0, str(BENCHMARKS))
    from peers.notes import Setup, teller

    setup = Setup.read(sys.argv[1])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    tell = teller(setup.events, rank, world_size)
    import torch
    import torch.distributed as dist
    from plain_ddp import DdpRank

    from elastictrain.config import TrainConfig

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tell("loop")
    tell("imported")
    training = DdpRank(TrainConfig.from_dict(setup.config), Path(setup.data_folder), rank, world_size)
    tell("engine")
    storage, newest, step = Path(setup.storage), Path(setup.storage, STEP_FILE), 0
    if newest.exists():
        step = json.loads(newest.read_text())["step"]
        training.load(str(storage / f"step-{step}"))
    tell("restored", step)
    training.begin(step + 1)
    while True:
        step += 1
        training.step(step)
        tell("step", step)
        if step % setup.checkpoint_every == 0 and rank == 0:
            folder = storage / f"step-{step}"
            folder.mkdir(exist_ok=True)
            training.save(str(folder))
            # whoever is killed meanwhile leaves the one before it in force
            part = newest.with_suffix(".part")
            part.write_text(json.dumps({"step": step}))
            os.replace(part, newest)
            tell("checkpoint", step)


if __name__ == "__main__":
    main()
