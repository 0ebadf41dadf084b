"""Digests of tensors where they lie: equal bytes, equal digests; one changed bit, another digest.

On the CPU xxh3_64 of the bytes end to end, about 10 GB/s, so a shard's digest is the checksum of its export. On CUDA
the sum of each tensor's words as integers, which one changed word always changes: it runs at the speed of the device's
memory, where a hash would first have to bring the bytes over the bus. Only digests of one kind of device compare.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

WORDS = {2: torch.int16, 4: torch.int32}
"""The integers with as many bytes."""


def digest(tensors: Sequence[Tensor]) -> str:
    """16 hex digits over all of them, in this order; each contiguous, with elements of 2 or 4 bytes."""
    return digests(tensors)[-1]


def digests(tensors: Sequence[Tensor]) -> list[str]:
    """The digest of none of them, of the first, of the first two, and so on up to all; costs no more than the last."""
    hasher = xxhash.xxh3_64()
    found = [hasher.hexdigest()]
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    if flat and flat[0].is_cuda:
        sums = torch.stack([t.view(WORDS[t.element_size()]).sum(dtype=torch.int64) for t in flat])
        flat = list(sums.cpu().unsqueeze(1))
    for tensor in flat:
        hasher.update(tensor.view(torch.uint8).numpy().data)
        found.append(hasher.hexdigest())
    return found
