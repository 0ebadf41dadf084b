"""Reading token shards: any sample by its id, from memory-mapped Arrow files.

A split's samples are numbered through its shards in order. Opening costs one `stat` per shard; a shard is mapped when
first touched; a sample is found by one bisection and copied once. Nothing is read ahead: the page cache does that.
Not thread-safe while shards are still being opened: one reader, one thread.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from elastictrain.data.manifest import Manifest, ShardRecord
from elastictrain.data.pack import BATCH_ROWS, Tokens
from elastictrain.errors import DataError


class TokenShards:
    """The samples of one split of prepared data."""

    def __init__(self, manifest: Manifest, split: Literal["train", "validation"] = "train") -> None:
        self._folder = manifest.folder
        self._shards = manifest.train if split == "train" else manifest.validation
        self._starts = list(accumulate((s.num_samples for s in self._shards), initial=0))
        self._open: dict[int, list[Tokens]] = {}
        self.row_tokens = manifest.seq_len + 1
        for shard in self._shards:
            _require_size(self._folder / shard.name, shard)

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, samples: Sequence[int]) -> Tensor:
        """These samples' tokens, int64 [len(samples), seq_len + 1]; raises IndexError for an id out of range."""
        rows = np.empty((len(samples), self.row_tokens), dtype=np.int64)
        for i, sample in enumerate(samples):
            rows[i] = self._row(sample)
        return torch.from_numpy(rows)

    def _row(self, sample: int) -> Tokens:
        if not 0 <= sample < len(self):
            raise IndexError(f"there is no sample {sample}: this data has {len(self)}")
        index = bisect_right(self._starts, sample) - 1
        if index not in self._open:
            shard = self._shards[index]
            self._open[index] = _map(self._folder / shard.name, shard.num_samples, self.row_tokens)
        batch, row = divmod(sample - self._starts[index], BATCH_ROWS)
        tokens: Tokens = self._open[index][batch][row]
        return tokens


def _require_size(path: Path, shard: ShardRecord) -> None:
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise DataError(f"can't read the token shard {path}: {error.strerror}. {_CURE}") from None
    if num_bytes != shard.num_bytes:
        raise DataError(f"the token shard {path} is damaged: {num_bytes} bytes, not {shard.num_bytes}. {_CURE}")


def _map(path: Path, num_samples: int, row_tokens: int) -> list[Tokens]:
    """The shard's batches; what does not hold these rows of tokens, just so laid out, is refused before it is used."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        columns = [_tokens(reader.get_batch(i), row_tokens) for i in range(reader.num_record_batches)]
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"can't read the token shard {path}: {error}. {_CURE}") from None
    found = [len(rows) for rows in columns]
    full, rest = divmod(num_samples, BATCH_ROWS)
    if found != [BATCH_ROWS] * full + [rest] * bool(rest):
        raise DataError(f"the token shard {path} is damaged: it has not the {num_samples} rows of its record. {_CURE}")
    return columns


def _tokens(batch: pa.RecordBatch, row_tokens: int) -> Tokens:
    batch.validate()  # Arrow trusts the offsets in a file, unless asked not to
    column = batch.column("tokens")
    for token, numpy_type in ((pa.uint16(), np.uint16), (pa.int32(), np.int32)):
        if column.type == pa.list_(token, row_tokens):
            values = column.values
            if column.null_count or values.null_count:
                raise ValueError("its column `tokens` has gaps")
            # Arrow's own to_numpy imports pandas: half a second and 60 MB in each worker
            flat = np.frombuffer(values.buffers()[1], numpy_type)[values.offset : values.offset + len(values)]
            tokens: Tokens = flat.reshape(-1, row_tokens)[column.offset : column.offset + len(column)]
            return tokens
    raise ValueError(f"its column `tokens` is of type {column.type}, not rows of {row_tokens} tokens")


_CURE = "Submit the run again: its data is checked and what is damaged is made anew."
