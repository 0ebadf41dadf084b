"""Bits per byte are of exactly the text that the evaluated rows predict."""

import gzip
from math import log

import pytest

from elastictrain.config import DataSection
from elastictrain.data.corpus import find_documents
from elastictrain.data.heldout import held_out
from elastictrain.data.manifest import Manifest
from elastictrain.data.spans import read


@pytest.mark.parametrize("limit", [1, 7, 100, 10**6])
def test_the_bytes_are_those_of_the_rows(manifest: Manifest, email_data: DataSection, limit: int) -> None:
    held = held_out(manifest, limit)
    assert len(held.rows) == min(limit, manifest.num_validation_samples)
    whole = b"".join(read(span) for span in find_documents(email_data).validation)
    text = whole[: held.num_bytes]
    assert manifest.tokenizer().decode(held.rows[:, 1:].flatten().tolist()).encode().startswith(text[:-3])
    assert held.gzip_bytes == len(gzip.compress(text, 9, mtime=0))
    assert held.gzip_bits_per_byte == 8 * held.gzip_bytes / held.num_bytes
    if limit == 10**6:
        assert len(whole) - held.num_bytes < 32 * manifest.seq_len


def test_a_uniform_model_of_bytes_takes_eight_bits(manifest: Manifest) -> None:
    held = held_out(manifest, 10)
    assert held.bits_per_byte(held.num_bytes * log(256)) == pytest.approx(8)
