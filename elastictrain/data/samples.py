"""The samples of a run, whatever they are: rows of tokens from a corpus, or what `data.samples` names.

Samples are numbered from 0, and a sample is the same whenever it is asked for: the order, the cursor and exactly-once
are arithmetic on these numbers. A batch is a dict of tensors, samples first. Text needs no more than `data.corpus`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from elastictrain.config import TrainConfig
from elastictrain.data.manifest import Manifest
from elastictrain.data.shards import TokenShards
from elastictrain.errors import DataError, RunConflictError
from elastictrain.events import DataReady
from elastictrain.workloads.base import Batch
from elastictrain.workloads.named import load_named, theirs

Split = Literal["train", "validation"]

DIGEST_SAMPLES = 64
"""Of each split, spread evenly, that the digest of named samples is taken of."""


class Samples(Protocol):
    """Numbered samples; what `data.samples` makes of the config and `train` or `validation`."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def read(self, samples: Sequence[int]) -> Batch:
        """The samples of these numbers as named tensors, in this order, samples first. Called in one thread."""
        ...


@dataclass(frozen=True)
class TextSamples:
    """Rows of tokens under the name that language models expect."""

    shards: TokenShards

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, samples: Sequence[int]) -> Batch:
        """See `Samples.read`."""
        return {"tokens": self.shards.read(samples)}


@dataclass(frozen=True)
class TensorSamples:
    """Samples that fit into memory: named tensors of equal length."""

    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        lengths = {name: len(tensor) for name, tensor in self.tensors.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"the tensors of samples must be named and of one length, not {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def read(self, samples: Sequence[int]) -> Batch:
        """See `Samples.read`."""
        return {name: tensor[list(samples)] for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class RunData:
    """What a rank reads."""

    train: Samples
    manifest: Manifest | None
    """Of the text; None where samples are named."""

    @classmethod
    def open(cls, config: TrainConfig, folder: Path) -> RunData:
        """The run's samples; `folder` is that of the prepared text, where there is text."""
        if config.data.samples is not None:
            return cls(named_samples(config, "train"), None)
        manifest = Manifest.load(folder)
        return cls(TextSamples(TokenShards(manifest)), manifest)

    @property
    def vocab_size(self) -> int:
        """Of the text's tokenizer; 0 without text."""
        return self.manifest.vocab_size if self.manifest else 0


@dataclass(frozen=True)
class NamedData:
    """What is known of named samples before a worker starts."""

    num_samples: int
    num_validation_samples: int
    sha256: str
    """Of the counts and of some samples of each split; it tells another data set, not every changed sample."""


def named_samples(config: TrainConfig, split: Split) -> Samples:
    """What `data.samples` makes of a split; raises DataError when there is nothing in it."""
    named = str(config.data.samples)
    factory = load_named("data.samples", named)
    with theirs(f"data.samples {named} can't be called with the config and {split!r}"):
        samples: Samples = factory(config, split)
        count = len(samples)
    if not count:
        raise DataError(f"data.samples {named} has no samples of the split {split}")
    return samples


def look_at_named(config: TrainConfig) -> NamedData:
    """Count and sample both splits."""
    digest, counts = sha256(), list[int]()
    for split in ("train", "validation"):
        samples = named_samples(config, split)
        counts.append(len(samples))
        digest.update(f"{split} {len(samples)}\0".encode())
        with theirs(f"data.samples {config.data.samples} can't be read"):
            batch = samples.read(_spread(len(samples)))
        for name, tensor in sorted(batch.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return NamedData(counts[0], counts[1], digest.hexdigest())


def refuse_other_samples(config: TrainConfig, before: DataReady | None) -> None:
    """Raise RunConflictError when named samples are not those that the run began with: the order would mean others.

    Text needs none of this: its folder is found by a fingerprint of all of it.
    """
    if before is None or config.data.samples is None:
        return
    found = look_at_named(config)
    if before.sha256 != found.sha256:
        raise RunConflictError(
            f"data.samples {config.data.samples} gives other samples than those that the run began with: "
            f"{found.num_samples:,} and {found.num_validation_samples:,} held out, and it was {before.num_samples:,} "
            f"and {before.num_validation_samples:,}. Give the old ones back, or choose another run.name."
        )


def _spread(count: int) -> Sequence[int]:
    return range(0, count, max(1, count // DIGEST_SAMPLES))[:DIGEST_SAMPLES]
