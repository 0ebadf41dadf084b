"""Packing: text becomes rows of tokens, and the rows an Arrow IPC file.

The tokens of all spans stand in one line, the end of text (`<|endoftext|>`) before each span. Row i is the seq_len + 1
tokens from i x seq_len on: rows overlap by one token, so each token but the very first is predicted exactly once. What
does not fill the last row is dropped and counted. The file is uncompressed, with BATCH_ROWS rows to a record batch: a
reader maps it and finds any row by arithmetic. The bytes of a shard follow from text and tokenizer alone. Memory: a
piece of text and its tokens, about 20 MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from elastictrain.data.manifest import ShardRecord, file_sha256, replacing
from elastictrain.data.spans import Span, pieces, read
from elastictrain.data.tokenizer import Tokenizer

BATCH_ROWS = 1024
_PIECE_BYTES = 1 << 20

Tokens = np.ndarray[Any, np.dtype[Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint16 and int32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def write_shard(folder: Path, name: str, spans: Iterable[Span], tokenizer: Tokenizer, seq_len: int) -> ShardRecord:
    """Tokenise and pack the spans into the file `name`, then write its record beside it."""
    text = _Text(tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    schema = pa.schema([pa.field("tokens", pa.list_(pa.from_numpy_dtype(dtype), seq_len + 1), nullable=False)])
    path = folder / name
    num_samples = 0
    with replacing(path) as file, pa.ipc.new_file(file, schema) as writer:
        for rows in pack(text.tokens(spans), seq_len):
            flat = pa.array(np.ascontiguousarray(rows, dtype=dtype).reshape(-1))
            column = pa.FixedSizeListArray.from_arrays(flat, type=schema.field("tokens").type)
            writer.write_batch(pa.record_batch([column], schema=schema))
            num_samples += len(rows)
    record = ShardRecord(
        name=name,
        sha256=file_sha256(path),
        num_bytes=path.stat().st_size,
        tokenizer_sha256=tokenizer.sha256(),
        num_samples=num_samples,
        num_tokens=text.num_tokens,
        num_dropped_tokens=text.num_tokens - (num_samples * seq_len + 1 if num_samples else 0),
        num_text_bytes=text.num_bytes,
        num_replaced=text.num_replaced,
    )
    record.save(folder)
    return record


def pack(tokens: Iterable[Tokens], seq_len: int) -> Iterator[Tokens]:
    """Rows [BATCH_ROWS, seq_len + 1] of the tokens laid end to end; the last batch may be shorter."""
    wanted = BATCH_ROWS * seq_len + 1
    parts: list[Tokens] = []
    held = 0
    for part in tokens:
        parts.append(part)
        held += len(part)
        if held >= wanted:
            line = np.concatenate(parts)
            while len(line) >= wanted:
                yield _rows(line[:wanted], seq_len)
                line = line[wanted - 1 :]
            parts, held = [line], len(line)
    if held > seq_len:
        yield _rows(np.concatenate(parts), seq_len)


class _Text:
    """Tokens of spans, counted as they pass."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_bytes = self.num_tokens = self.num_replaced = 0

    def tokens(self, spans: Iterable[Span]) -> Iterator[Tokens]:
        for span in spans:
            yield self._counted([self._tokenizer.end_of_text_id])
            for piece in pieces(span, _PIECE_BYTES):
                self.num_bytes += piece.num_bytes
                yield self._counted(self._tokenizer.encode(self._decoded(read(piece))))

    def _decoded(self, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.num_replaced += 1
            return data.decode(errors="replace")

    def _counted(self, ids: list[int]) -> Tokens:
        self.num_tokens += len(ids)
        return np.array(ids, dtype=np.int32)


def _rows(line: Tokens, seq_len: int) -> Tokens:
    return np.lib.stride_tricks.sliding_window_view(line, seq_len + 1)[::seq_len]
