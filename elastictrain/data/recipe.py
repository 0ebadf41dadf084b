"""The recipe of prepared data: what is to be made of a corpus, as a function of documents and config alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any

from elastictrain.config import DataSection
from elastictrain.data.corpus import Corpus
from elastictrain.data.manifest import FORMAT_VERSION
from elastictrain.data.spans import Span, partition, pieces, read
from elastictrain.data.tokenizer import Tokenizer

TOKENIZER_TEXT_BYTES = 4 << 20
"""How much of the training text the tokenizer learns from, spread over all of it."""

_TOKENIZER_PIECE_BYTES = 64 << 10
_MIN_SHARD_SAMPLES = 64
_TYPICAL_TOKEN_BYTES = 4


def fingerprint(corpus: Corpus, data: DataSection, tokenizer: Tokenizer | None = None) -> str:
    """Digest of everything that decides what the shards hold, hex; reads the whole corpus.

    `tokenizer` is the one that is given, None where it is made of the corpus.
    """
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "documents": corpus.sha256(),
        "data": data.model_dump(include={"seq_len", "vocab_size", "validation_fraction", "num_shards"}),
    }
    if tokenizer is not None:
        content["tokenizer"] = [tokenizer.sha256(), tokenizer.end_of_text]
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def plan_shards(corpus: Corpus, data: DataSection) -> dict[str, tuple[Span, ...]]:
    """The text of every shard by the shard's name, training first; all shards are of about the same size.

    A small corpus gets fewer than data.num_shards, because each shard drops the tokens that do not fill its last row.
    """
    least_bytes = _MIN_SHARD_SAMPLES * data.seq_len * _TYPICAL_TOKEN_BYTES
    shard_bytes = max(_num_bytes(corpus.train) // data.num_shards, least_bytes)
    plan = {}
    for split, spans in (("train", corpus.train), ("validation", corpus.validation)):
        parts = max(1, _num_bytes(spans) // shard_bytes)
        for i, group in enumerate(partition(spans, parts)):
            plan[f"{split}-{i:05}.arrow"] = group
    return plan


def tokenizer_text(spans: Sequence[Span]) -> Iterator[str]:
    """About TOKENIZER_TEXT_BYTES of the spans' text, in pieces from all over it."""
    total = _num_bytes(spans)
    seen = taken = 0
    for span in spans:
        for piece in pieces(span, _TOKENIZER_PIECE_BYTES):
            if taken * total <= seen * TOKENIZER_TEXT_BYTES:
                yield read(piece).decode(errors="replace")
                taken += piece.num_bytes
            seen += piece.num_bytes


def _num_bytes(spans: Sequence[Span]) -> int:
    return sum(span.num_bytes for span in spans)
