"""States to store and compare: named arrays, cut into shards in any way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from elastictrain.checkpoint.checksum import checksum
from elastictrain.state.tensors import Fragment, LogicalTensor, ShardHeader, ShardIndex


@dataclass(frozen=True)
class State:
    """Whole tensors, and how to see them as shards."""

    arrays: dict[str, np.ndarray]

    @property
    def tensors(self) -> tuple[LogicalTensor, ...]:
        return tuple(LogicalTensor(name, array.shape) for name, array in self.arrays.items())

    def index(self, rank: int, world_size: int) -> ShardIndex:
        """Every tensor cut into world_size nearly equal flat ranges."""
        return ShardIndex(
            tuple(
                Fragment(
                    name, a.size * rank // world_size, a.size * (rank + 1) // world_size - a.size * rank // world_size
                )
                for name, a in self.arrays.items()
            )
        )

    def shard(self, index: ShardIndex) -> bytes:
        return b"".join(self.arrays[f.tensor].reshape(-1)[f.start : f.stop].tobytes() for f in index.fragments)

    def header(self, index: ShardIndex, rank: int, world_size: int, step: int = 1, generation: int = 1) -> ShardHeader:
        digest = checksum(self.shard(index))
        return ShardHeader(generation, step, rank, world_size, digest, {"optimizer_step": step, "loss_scale": 0.1})

    def read_from(self, source: object) -> dict[str, np.ndarray]:
        """All tensors as the source has them."""
        found = {name: np.zeros(array.shape, np.float32) for name, array in self.arrays.items()}
        whole = [Fragment(name, 0, array.size) for name, array in found.items()]
        source.fill([(f, memoryview(found[f.tensor].reshape(-1))) for f in whole])
        return found

    def equals(self, arrays: dict[str, np.ndarray]) -> bool:
        return all(self.arrays[name].tobytes() == arrays[name].tobytes() for name in self.arrays)


@pytest.fixture
def state() -> State:
    random = np.random.default_rng(0)
    shapes = {"param/a": (7, 5), "exp_avg/a": (7, 5), "param/b": (11,), "exp_avg/b": (11,), "param/scalar": ()}
    return State({name: np.asarray(random.standard_normal(shape), np.float32) for name, shape in shapes.items()})
