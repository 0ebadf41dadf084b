"""Prepared data of real text, made without Ray."""

import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from elastictrain.config import DataSection
from elastictrain.data.corpus import find_documents
from elastictrain.data.manifest import MANIFEST_NAME, Manifest, replacing
from elastictrain.data.pack import write_shard
from elastictrain.data.recipe import fingerprint, plan_shards, tokenizer_text
from elastictrain.data.tokenizer import TOKENIZER_NAME, Tokenizer

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def make(data: DataSection, folder: Path) -> Manifest:
    corpus = find_documents(data)
    tokenizer = Tokenizer.train(tokenizer_text(corpus.train), data.vocab_size)
    (folder / TOKENIZER_NAME).write_text(tokenizer.json, encoding="utf-8")
    plan = plan_shards(corpus, data)
    records = [write_shard(folder, name, spans, tokenizer, data.seq_len) for name, spans in plan.items()]
    manifest = Manifest(
        folder=folder,
        fingerprint=fingerprint(corpus, data),
        seq_len=data.seq_len,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256(),
        num_documents=len(corpus.documents),
        num_empty=corpus.num_empty,
        num_bytes=corpus.num_bytes,
        train=tuple(r for r in records if r.name.startswith("train")),
        validation=tuple(r for r in records if r.name.startswith("validation")),
    )
    with replacing(folder / MANIFEST_NAME) as file:
        file.write(manifest.to_json().encode())
    return manifest


@pytest.fixture(scope="session")
def make_data() -> Callable[[DataSection, Path], Manifest]:
    return make


@pytest.fixture(scope="session")
def email_data() -> DataSection:
    """Python's own `email` package: 29 files, 400 kB."""
    return DataSection(corpus=str(STDLIB / "email"), vocab_size=512, seq_len=32, num_shards=4, validation_fraction=0.1)


@pytest.fixture(scope="session")
def manifest(email_data: DataSection, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make(email_data, tmp_path_factory.mktemp("email"))
