"""The baseline: the same training under Ray Train (v2), the way its documentation shows it.

`TorchTrainer` over gloo with an elastic number of workers, a checkpoint handed to `ray.train.report` every few steps,
and a `FailureConfig` that restarts the group. All else is Ray Train's default. With the engine `deepspeed` the
checkpoint is DeepSpeed's own of every rank; with `ddp` it is rank 0's, of the whole state.

    python benchmarks/peers/ray_train.py job.json         the job, on the cluster in RAY_ADDRESS; see `notes.Setup`
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
STEP_FILE = "step.json"


def train_loop(fields: dict[str, Any]) -> None:
    """What each worker of Ray Train runs."""
    sys.path.insert(0, str(BENCHMARKS))
    import ray.train
    from peers.notes import Setup, teller

    setup = Setup(**fields)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    tell = teller(setup.events, rank, world_size)
    tell("loop")
    try:
        training = _rank(setup, rank, world_size, tell)
        step, found = 0, ray.train.get_checkpoint()
        if found:
            with found.as_directory() as folder:
                training.load(folder)
                step = json.loads(Path(folder, STEP_FILE).read_text())["step"]
    except Exception as error:
        tell("failed", problem=f"{type(error).__name__}: {error}"[:500])
        raise
    tell("restored", step)
    training.begin(step + 1)
    while True:
        step += 1
        losses = training.step(step)
        tell("step", step)
        if step % setup.checkpoint_every == 0:
            with tempfile.TemporaryDirectory() as folder:
                training.save(folder)
                checkpoint = None
                if rank == 0:
                    Path(folder, STEP_FILE).write_text(json.dumps({"step": step}))
                if rank == 0 or setup.engine == "deepspeed":
                    checkpoint = ray.train.Checkpoint.from_directory(folder)
                ray.train.report({"loss": losses[-1]}, checkpoint=checkpoint)
            tell("checkpoint", step)


def _rank(setup: Any, rank: int, world_size: int, tell: Any) -> Any:
    """One rank of either engine; data-parallel training does without the import of DeepSpeed."""
    from elastictrain.config import TrainConfig

    if setup.engine == "ddp":
        from plain_ddp import DdpRank as Rank
    else:
        from plain_deepspeed import PlainRank as Rank  # type: ignore[assignment]  # one of two

        from elastictrain.engine.device import prepare_process

        prepare_process(lean=False)
    tell("imported")
    training = Rank(TrainConfig.from_dict(setup.config), Path(setup.data_folder), rank, world_size)
    tell("engine")
    return training


def main() -> None:
    """Run the job that the file describes, until it is killed."""
    sys.path.insert(0, str(BENCHMARKS))
    from peers.notes import Setup

    setup = Setup.read(sys.argv[1])
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
