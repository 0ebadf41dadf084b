"""The baseline: the same training under Ray Train (v2) with DeepSpeed ZeRO, the way its documentation shows it.

`TorchTrainer` over gloo with an elastic number of workers, DeepSpeed's own checkpoint of every rank handed to
`ray.train.report` every few steps, and a `FailureConfig` that restarts the group. All else is Ray Train's default. The
loop and the arithmetic are those of plain_deepspeed.py. Each rank appends what it does to a file of JSON lines, from
which the benchmark reads: loop (the training function was entered), imported, engine, restored, step, checkpoint.

    python benchmarks/peers/ray_train.py job.json         the job, on the cluster in RAY_ADDRESS; see `Setup`
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
TAG = "state"
STEP_FILE = "step.json"


@dataclass(frozen=True, slots=True)
class Setup:
    """One job."""

    name: str
    config: dict[str, Any]
    """An elastictrain config; model, data, optimisation and ZeRO stage are taken from it."""
    data_folder: str
    """Token shards that elastictrain has prepared."""
    storage: str
    checkpoint_every: int
    events: str
    """File to append what happens to."""


def note(path: str, event: str, **fields: Any) -> None:
    """Append one line; a line this short is written whole, whoever else writes."""
    with open(path, "a") as file:
        file.write(json.dumps({"event": event, "at": time.time(), "pid": os.getpid(), **fields}) + "\n")


def read_notes(path: Path) -> list[dict[str, Any]]:
    """What has been appended so far."""
    return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []


def train_loop(fields: dict[str, Any]) -> None:
    """What each worker of Ray Train runs."""
    setup = Setup(**fields)
    import ray.train

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()

    def tell(event: str, step: int = 0) -> None:
        note(setup.events, event, rank=rank, world_size=world_size, step=step)

    tell("loop")
    sys.path.insert(0, str(BENCHMARKS))
    from plain_deepspeed import PlainRank

    from elastictrain.config import TrainConfig
    from elastictrain.engine.device import prepare_process

    prepare_process()
    tell("imported")
    training = PlainRank(TrainConfig.from_dict(setup.config), Path(setup.data_folder), rank, world_size)
    tell("engine")
    step, found = 0, ray.train.get_checkpoint()
    if found:
        with found.as_directory() as folder:
            training.engine.load_checkpoint(folder, tag=TAG)
            step = json.loads(Path(folder, STEP_FILE).read_text())["step"]
    tell("restored", step)
    training.begin(step + 1)
    while True:
        step += 1
        losses = training.step(step)
        tell("step", step)
        if step % setup.checkpoint_every == 0:
            with tempfile.TemporaryDirectory() as folder:
                training.engine.save_checkpoint(folder, tag=TAG)
                if rank == 0:
                    Path(folder, STEP_FILE).write_text(json.dumps({"step": step}))
                ray.train.report({"loss": losses[-1]}, checkpoint=ray.train.Checkpoint.from_directory(folder))
            tell("checkpoint", step)


def main() -> None:
    """Run the job that the file describes, until it is killed."""
    setup = Setup(**json.loads(Path(sys.argv[1]).read_text()))
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(log_to_driver=False)
    elastic = setup.config["elastic"]
    TorchTrainer(
        train_loop,
        train_loop_config=asdict(setup),
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=(elastic["min_workers"], elastic["max_workers"]), resources_per_worker={"CPU": 1}
        ),
        run_config=RunConfig(
            name=setup.name,
            storage_path=setup.storage,
            failure_config=FailureConfig(max_failures=20),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


if __name__ == "__main__":
    main()
