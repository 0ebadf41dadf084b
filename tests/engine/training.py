"""A small language model to train in tests: config, micro-batches, a whole run of steps, and states in a folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranks import Rank

from elastictrain.config import TrainConfig
from elastictrain.engine.build import build_engine
from elastictrain.engine.schedule import learning_rate
from elastictrain.engine.zero import ZeroEngine
from elastictrain.state.reshard import plan_copies
from elastictrain.state.tensors import PARTS, Fragment, ShardIndex
from elastictrain.workloads.language_model import LanguageModel

VOCAB_SIZE = 2051
"""Prime, so that shards come out uneven; the embedding is too large for ZeRO 3 to keep gathered."""
NUM_MICRO_BATCHES = 6
"""Of a step, unless train.global_batch is another."""


def train_config(
    zero_stage: int,
    dtype: str = "fp32",
    *,
    degrees: Mapping[str, int] | None = None,
    num_layers: int = 2,
    offload: str = "none",
    gradient_dtype: str = "fp32",
    model: Mapping[str, Any] | None = None,
    **train: Any,
) -> TrainConfig:
    """Six micro-batches of two sequences a step: 1, 2, 3 or 6 replicas. Clipping is active.

    `degrees`: pp, tp, sp, ep, the last with four experts in place of each MLP.
    """
    drive = {"offload_path": tempfile.gettempdir()} if offload == "nvme" else {}
    manual = {"layout": "manual", **degrees} if degrees else {}
    experts = {"num_experts": 4} if "ep" in manual else {}
    return TrainConfig.from_dict(
        {
            "train": {"dtype": dtype, "global_batch": 12, "micro_batch": 2, "grad_clip": 0.2, "steps": 12}
            | {"warmup_steps": 3, "learning_rate": 1e-2, "seed": 7}
            | train,
            "model": {"num_layers": num_layers, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "dropout": 0.1}
            | experts
            | dict(model or {}),
            "data": {"seq_len": 16},
            "parallel": {"zero_stage": zero_stage, "offload": offload, "gradient_dtype": gradient_dtype}
            | {**drive, **manual},
            "elastic": {"max_workers": prod((degrees or {}).values())},
        }
    )


def workload(config: TrainConfig) -> LanguageModel:
    """The model of the tests."""
    return LanguageModel(config, VOCAB_SIZE)


def micro_batch(step: int, index: int) -> tuple[int, dict[str, torch.Tensor]]:
    """Dropout seed and tokens of global micro-batch `index` of a step."""
    seed = 1000 * step + index
    generator = torch.Generator().manual_seed(seed)
    return seed, {"tokens": torch.randint(0, VOCAB_SIZE, (2, 17), generator=generator)}


def ignore(*args: Any) -> None:
    """A callback that does nothing."""


def train(
    engine: ZeroEngine,
    config: TrainConfig,
    rank: int,
    world_size: int,
    steps: Sequence[int],
    on_phase: Callable[[str], None] = ignore,
) -> dict[tuple[int, int], float]:
    """Take these steps; returns this rank's losses by (step, global micro-batch)."""
    losses = {}
    layout = config.layout(world_size)
    replica = layout.place(rank).dp
    for step in steps:
        mine = range(replica * layout.accumulation, (replica + 1) * layout.accumulation)
        result = engine.train_step(
            [micro_batch(step, index) for index in mine],
            learning_rate=learning_rate(config.train, step),
            before_update=ignore,
            on_phase=on_phase,
        )
        told = mine if result.losses else []
        losses.update({(step, index): loss for index, loss in zip(told, result.losses, strict=True)})
        losses[step, -1] = result.grad_norm
    return losses


def save_shard(engine: ZeroEngine, folder: Path, rank: int) -> None:
    """Export this rank's shard to a file."""
    index = engine.shard_index()
    buffer = memoryview(bytearray(index.num_bytes))
    engine.export_into(buffer)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{rank}.bin").write_bytes(buffer)
    about = {"index": index.to_json(), "scalars": dict(engine.scalars())}
    (folder / f"{rank}.json").write_text(json.dumps(about))


class FolderSource:
    """A StateSource over what `save_shard` wrote."""

    def __init__(self, folder: Path) -> None:
        self._indices, self._shards = {}, {}
        self.scalars: Mapping[str, int | float] = {}
        for path in sorted(folder.glob("*.json")):
            about = json.loads(path.read_text())
            self._indices[int(path.stem)] = ShardIndex.from_json(about["index"])
            self._shards[int(path.stem)] = np.fromfile(path.with_suffix(".bin"), dtype=np.float32)
            self.scalars = about["scalars"]

    def fill(self, targets: Sequence[tuple[Fragment, memoryview]]) -> None:
        for copy in plan_copies(self._indices, [fragment for fragment, _ in targets]):
            target = np.frombuffer(targets[copy.target][1], dtype=np.float32)
            part = self._shards[copy.shard][copy.source_offset : copy.source_offset + copy.numel]
            target[copy.target_offset : copy.target_offset + copy.numel] = part

    def tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """Whole logical tensors; fails when an element is stored twice, or one is missing."""
        whole = {name: np.full(shapes[name], np.nan, dtype=np.float32).reshape(-1) for name in shapes}
        times = {name: np.zeros(array.size, dtype=int) for name, array in whole.items()}
        for rank, index in self._indices.items():
            assert index.numel == self._shards[rank].size
            for f, offset in zip(index.fragments, index.offsets, strict=True):
                whole[f.tensor][f.start : f.stop] = self._shards[rank][offset : offset + f.numel]
                times[f.tensor][f.start : f.stop] += 1
        for name, count in times.items():
            assert (count == 1).all(), f"{name} is not covered exactly once"
        return whole


def live_through(
    me: Rank, folder: Path, generation: int, members: range, config: TrainConfig
) -> dict[tuple[int, int], float]:
    """One step in a layout, with the state that the generation before left: imported, and exported again before it."""
    rank, world_size = me.index - members[0], len(members)
    group = me.group(generation, members)
    group.form()
    engine = build_engine(workload(config), config, config.layout(world_size), group, loads_next=generation > 0)
    if generation:
        engine.import_state(FolderSource(folder / f"after{generation - 1}"))
        save_shard(engine, folder / f"imported{generation}", rank)
    assert {t.name: t.shape for t in engine.tensors()} == logical_shapes(config)
    losses = train(engine, config, rank, world_size, [generation + 1])
    save_shard(engine, folder / f"after{generation}", rank)
    assert engine.scalars() == {"optimizer_step": generation + 1}
    engine.close()
    group.close()
    return losses


@contextmanager
def one_thread() -> Iterator[None]:
    """As each rank has: more would add up floats in another order, and training makes much of that."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def plain_losses(config: TrainConfig, steps: Sequence[int]) -> dict[tuple[int, int], float]:
    """The same training in ten lines of torch, without DeepSpeed, ranks or fused kernels: what is right."""
    model = workload(config)
    module = model.build(config.train.seed)
    named = dict(module.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if model.decays(n, p)], "weight_decay": config.train.weight_decay},
        {"params": [p for n, p in named.items() if not model.decays(n, p)], "weight_decay": 0.0},
    ]
    betas = (config.train.beta1, config.train.beta2)
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=config.train.epsilon, foreach=False)
    num_micro_batches = config.train.global_batch // config.train.micro_batch
    losses = {}
    for step in steps:
        for index in range(num_micro_batches):
            seed, batch = micro_batch(step, index)
            torch.manual_seed(seed)
            loss = model.loss(module, batch)
            losses[step, index] = loss.item()
            (loss / num_micro_batches).backward()
        losses[step, -1] = float(torch.nn.utils.clip_grad_norm_(module.parameters(), config.train.grad_clip))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.train, step)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def logical_shapes(config: TrainConfig) -> dict[str, tuple[int, ...]]:
    """Every logical tensor of the model's state."""
    named = workload(config).build(0).named_parameters()
    return {f"{part}/{name}": tuple(p.shape) for name, p in named for part in PARTS}
