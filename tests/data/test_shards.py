"""Token shards hold the text, each token predicted once, and damage is told."""

import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.config import DataSection
from elastictrain.data.corpus import find_documents
from elastictrain.data.manifest import Manifest, replacing
from elastictrain.data.pack import pack
from elastictrain.data.recipe import plan_shards
from elastictrain.data.shards import TokenShards
from elastictrain.data.spans import read
from elastictrain.errors import DataError, InfrastructureError

MakeData = Callable[[DataSection, Path], Manifest]


@given(st.lists(st.integers(0, 3000), max_size=8), st.integers(1, 9))
def test_rows_overlap_by_one_and_drop_only_the_tail(lengths: list[int], seq_len: int) -> None:
    total = sum(lengths)
    parts = np.split(np.arange(total), np.cumsum(lengths)[:-1]) if lengths else []
    rows = [row.tolist() for batch in pack(parts, seq_len) for row in batch]
    assert rows == [list(range(i, i + seq_len + 1)) for i in range(0, total - seq_len, seq_len)]


def test_the_rows_are_the_text(manifest: Manifest, email_data: DataSection) -> None:
    tokenizer = manifest.tokenizer()
    plan = plan_shards(find_documents(email_data), email_data)
    shards = TokenShards(manifest)
    first = 0
    for record in manifest.train:
        rows = shards.read(range(first, first + record.num_samples))
        first += record.num_samples
        text = b"".join(tokenizer.token_bytes[i] for i in rows[:, 1:].flatten().tolist())
        whole = b"".join(read(span) for span in plan[record.name])
        assert whole.startswith(text)
        assert len(whole) == record.num_text_bytes
        assert record.num_tokens == rows[:, 1:].numel() + 1 + record.num_dropped_tokens
        assert record.num_dropped_tokens < manifest.seq_len
        assert rows[0, 0] == 0
    assert first == len(shards) == manifest.num_samples
    assert len(manifest.train) == 4


def test_any_samples_in_any_order(manifest: Manifest) -> None:
    shards = TokenShards(manifest)
    everything = shards.read(range(len(shards)))
    picked = [len(shards) - 1, 0, 1500, 3, 1500]
    rows = shards.read(picked)
    assert rows.dtype == torch.int64
    assert rows.shape == (5, manifest.seq_len + 1)
    assert torch.equal(rows, everything[picked])
    for outside in (-1, len(shards)):
        with pytest.raises(IndexError, match="there is no sample"):
            shards.read([outside])


def test_a_large_vocabulary_takes_32_bits(tmp_path: Path, make_data: MakeData) -> None:
    source = tmp_path / "words.txt"
    source.write_text("\n".join(f"{i:x} {i * 7919:o}" for i in range(40_000)))
    folder = tmp_path / "data"
    folder.mkdir()
    manifest = make_data(DataSection(corpus=str(source), vocab_size=70_000, seq_len=16, num_shards=1), folder)
    assert manifest.vocab_size > 2**16
    rows = TokenShards(manifest).read(range(manifest.num_samples))
    text = manifest.tokenizer().decode(rows[:, 1:].flatten().tolist())
    assert source.read_text().startswith(text)
    assert int(rows.max()) > 2**16


def test_text_that_is_not_utf8_is_read_and_counted(tmp_path: Path, make_data: MakeData) -> None:
    (tmp_path / "latin.txt").write_bytes("café au lait\n".encode("latin-1") * 200)
    (tmp_path / "utf8.txt").write_bytes("café au lait\n".encode() * 200)
    folder = tmp_path / "data"
    folder.mkdir()
    data = DataSection(
        corpus=str(tmp_path / "*.txt"), vocab_size=300, seq_len=16, num_shards=1, validation_fraction=0.1
    )
    manifest = make_data(data, folder)
    assert manifest.num_replaced >= 1
    rows = TokenShards(manifest).read(range(manifest.num_samples))
    assert "caf� au lait" in manifest.tokenizer().decode(rows[:, 1:].flatten().tolist())


def test_the_manifest_comes_back(manifest: Manifest) -> None:
    loaded = Manifest.load(manifest.folder)
    assert loaded == manifest
    assert loaded.sha256() == manifest.sha256()


def test_a_missing_or_damaged_manifest_is_told(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no prepared data in"):
        Manifest.load(tmp_path)
    for content in (manifest.to_json()[:-40], "[]", "{}", manifest.to_json().replace('"seq_len"', '"seqlen"')):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(DataError, match=r"manifest\.json is damaged"):
            Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text(manifest.to_json().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(DataError, match="another version"):
        Manifest.load(tmp_path)


def test_a_damaged_shard_is_told(manifest: Manifest, tmp_path: Path) -> None:
    shard = manifest.train[0]
    here = replace(manifest, folder=tmp_path, train=(shard,))
    with pytest.raises(DataError, match=r"train-00000\.arrow: No such file"):
        TokenShards(here)
    content = (manifest.folder / shard.name).read_bytes()
    (tmp_path / shard.name).write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"damaged: {len(content) - 1} bytes, not {len(content)}"):
        TokenShards(here)
    (tmp_path / shard.name).write_bytes(bytes(len(content)))
    with pytest.raises(DataError, match=r"can't read the token shard .*train-00000\.arrow"):
        TokenShards(here).read([0])


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    def write_half() -> None:
        with replacing(tmp_path / "a") as file:
            file.write(b"half")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_names_the_knob_and_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with replacing(tmp_path / "a") as file:
            file.write(bytes(1 << 16))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, hard))  # as on a disk with 4 KiB left
    try:
        with pytest.raises(InfrastructureError, match=r"can't write .*/a: .*run\.storage: make room"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
