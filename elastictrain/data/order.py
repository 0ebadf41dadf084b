"""The sample order (pure): which sample stands at which position of the run, whatever the world size.

Each epoch is a permutation of [0, N), computed per index and never stored: a generalised Feistel network on
Z_a x Z_b with a x b >= N, walked until it lands below N (Black & Rogaway, "Ciphers with arbitrary finite domains",
CT-RSA 2002, methods 2 and 3). With a = ceil(sqrt(N)) and b = ceil(N / a), a x b exceeds N by less than a, so a walk
almost never takes a second turn. The round function is SplitMix64's finaliser (Steele, Lea & Flood, OOPSLA 2014);
the round keys are a BLAKE2b hash of (seed, epoch). The aim is a good shuffle, not secrecy.

Contract: positions count over all epochs from 0; the cursor of a run is one integer, the positions consumed. Steps
count from 1, and step s consumes [(s - 1) x B, s x B) for global batch B. A step is B / micro-batch global
micro-batches; replica r takes those with numbers r, r + dp, r + 2 dp, ..., and all of its ranks read the same. Nothing
depends on anything else.

Cost: O(1) memory; 3 microseconds a sample.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b, sha256
from math import isqrt

from elastictrain.plan.layout import Layout

EMPTY_CHAIN = sha256(b"elastictrain").hexdigest()
"""The chain of a run that has consumed no sample."""

_ROUNDS = 6
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The samples of one forward pass."""

    global_index: int
    """Its number within the step, over all ranks."""
    samples: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SampleOrder:
    """The order of `num_samples` samples under `seed`, for ever."""

    num_samples: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"an order needs at least one sample, not {self.num_samples}")

    def sample(self, position: int) -> int:
        """The sample at this position; each sample once in every N positions from a multiple of N."""
        epoch, index = divmod(position, self.num_samples)
        return _permute(index, self.num_samples, _round_keys(self.seed, epoch))

    def step_samples(self, step: int, global_batch: int) -> list[int]:
        """The samples of step `step` (from 1) over all ranks, in order."""
        return [self.sample(p) for p in range(cursor(step - 1, global_batch), cursor(step, global_batch))]

    def micro_batches(self, step: int, layout: Layout, rank: int) -> list[MicroBatch]:
        """What rank `rank` computes in step `step`, in order: `layout.accumulation` micro-batches."""
        size = layout.micro_batch
        first = cursor(step - 1, layout.global_batch)
        return [
            MicroBatch(g, tuple(self.sample(first + p) for p in range(g * size, (g + 1) * size)))
            for g in range(layout.place(rank).dp, layout.dp * layout.accumulation, layout.dp)
        ]


def cursor(step: int, global_batch: int) -> int:
    """Samples consumed after step `step` (0 before the first): all that needs to be remembered of the order."""
    if step < 0:
        raise ValueError(f"steps count from 1, so there is no cursor after step {step}")
    return step * global_batch


def dropout_seed(seed: int, step: int, global_index: int) -> int:
    """64 bits for the randomness inside one micro-batch: the same on whichever rank computes it."""
    return int.from_bytes(blake2b(f"dropout {seed} {step} {global_index}".encode(), digest_size=8).digest(), "little")


def chain(previous: str, samples: Sequence[int]) -> str:
    """The digest of all samples so far: SHA-256 of the previous digest's 32 bytes and the ids as little-endian int64.

    Begins with EMPTY_CHAIN and takes one step's samples at a time. Both digests are hex.
    """
    return sha256(bytes.fromhex(previous) + struct.pack(f"<{len(samples)}q", *samples)).hexdigest()


@lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = blake2b(f"order {seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return struct.unpack(f"<{_ROUNDS}Q", digest)


def _permute(index: int, num_samples: int, keys: tuple[int, ...]) -> int:
    width = isqrt(num_samples - 1) + 1
    height = -(-num_samples // width)
    while True:
        row, column = divmod(index, width)
        for even, odd in zip(keys[::2], keys[1::2]):
            column = (column + _mix(row + even)) % width
            row = (row + _mix(column + odd)) % height
        index = row * width + column
        if index < num_samples:
            return index


def _mix(x: int) -> int:
    x &= _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31
