"""The corpus: which documents `data.corpus` means, and which text is held out for validation.

`find_documents` looks at names and sizes only, so that a wrong path or too little text is told in milliseconds,
before anything starts. What is held out follows from names and sizes too: whole documents in the order of a hash of
their names, as long as they fit into `data.validation_fraction` of the bytes; where they fill less than half of it
(one file, or few large ones), the tail of the largest other document makes up the rest. Hashing the contents
(`Corpus.sha256`) reads everything once, about 1 GB/s.
"""

from __future__ import annotations

import difflib
import glob
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import takewhile
from pathlib import Path

from elastictrain.config import DataSection
from elastictrain.data.spans import Document, Span, cut_after, pieces, read
from elastictrain.errors import DataError

STDLIB = "python:stdlib"
"""The value of `data.corpus` that means the source of Python's own standard library."""

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """All documents with text in them, and how they are divided."""

    documents: tuple[Document, ...]
    """In the order of their names."""
    train: tuple[Span, ...]
    """In the order of their documents' names."""
    validation: tuple[Span, ...]
    """In the order of their names' hashes: the first of them are a sample of all."""
    num_empty: int
    """Files without a byte in them, left out."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all documents."""
        return sum(d.num_bytes for d in self.documents)

    def sha256(self) -> str:
        """Digest of all names and contents, hex."""
        digest = sha256()
        for document in self.documents:
            digest.update(f"{document.name}\0{document.num_bytes}\0".encode(errors="surrogateescape"))
            for piece in pieces(Span(document, 0, document.num_bytes), _PIECE_BYTES):
                digest.update(read(piece))
        return digest.hexdigest()


def find_documents(data: DataSection) -> Corpus:
    """The corpus that the config names; raises DataError when it is not there or holds too little text."""
    root, paths = _find(data)
    found = sorted((_document(root, path) for path in paths), key=lambda d: d.name)
    documents = tuple(d for d in found if d.num_bytes)
    if not documents:
        what = f"{found[0].path} is empty" if len(found) == 1 else f"all {len(found)} files are empty"
        raise DataError(f"data.corpus {data.corpus} holds no text: {what}. Point data.corpus at text.")
    train, validation = _hold_out(documents, data.validation_fraction)
    for part, spans in (("training", train), ("validation", validation)):
        num_bytes = sum(span.num_bytes for span in spans)
        if num_bytes <= data.seq_len:  # a token has at least one byte
            raise too_little_text(data, part, f"{num_bytes} bytes")
    return Corpus(documents, train, validation, len(found) - len(documents))


def too_little_text(data: DataSection, part: str, available: str) -> DataError:
    """The error for a corpus whose part, `training` or `validation`, does not make one sample."""
    more = f", or raise data.validation_fraction {data.validation_fraction:g}" if part == "validation" else ""
    return DataError(
        f"data.corpus {data.corpus} holds too little text: {available} for {part}, and one sample takes "
        f"{data.seq_len + 1} tokens (data.seq_len {data.seq_len} + 1). Give it more text, or lower data.seq_len{more}."
    )


def _find(data: DataSection) -> tuple[str, list[str]]:
    """The folder that names are relative to, and the paths of all regular files that belong."""
    corpus = sysconfig.get_paths()["stdlib"] if data.corpus == STDLIB else os.path.expanduser(data.corpus)
    if os.path.isfile(corpus):
        return os.path.dirname(corpus), [corpus]
    if os.path.isdir(corpus):
        paths = [path for path in _walk(corpus, data.exclude) if path.endswith(data.suffixes)]
        if not paths:
            raise DataError(
                f"data.corpus {data.corpus} has no file that ends in {', '.join(data.suffixes)} (data.suffixes), "
                f"outside folders named {', '.join(data.exclude) or 'nothing'} (data.exclude)."
            )
        return corpus, paths
    if glob.has_magic(corpus):
        root = os.path.join(".", *takewhile(lambda part: not glob.has_magic(part), Path(corpus).parts))
        paths = [
            path
            for path in set(glob.glob(corpus, recursive=True))
            if os.path.isfile(path) and not set(Path(os.path.relpath(path, root)).parts[:-1]) & set(data.exclude)
        ]
        if not paths:
            raise DataError(f"data.corpus {data.corpus} matches no file. `**` stands for any depth of folders.")
        return root, paths
    if os.path.exists(corpus):
        raise DataError(f"data.corpus {data.corpus} is neither a file nor a folder: give it one of them, or a glob.")
    raise DataError(
        f"data.corpus {data.corpus} is not there.{_near(Path(corpus))} Give it a file, a folder, a glob or {STDLIB}."
    )


def _walk(folder: str, exclude: tuple[str, ...]) -> Iterator[str]:
    for parent, folders, files in os.walk(folder, onerror=_refuse_unreadable):
        folders[:] = [name for name in folders if name not in exclude]
        yield from (path for name in files if os.path.isfile(path := os.path.join(parent, name)))


def _refuse_unreadable(error: OSError) -> None:
    raise DataError(f"can't list {error.filename}: {error.strerror}. data.exclude leaves folders out.")


def _near(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    try:
        names = os.listdir(parent)
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.7)
    if near:
        return f" Did you mean {' or '.join(str(parent / name) for name in near)}?"
    return f" There is no {path.name} in {parent.absolute()}."


def _document(root: str, path: str) -> Document:
    found = os.stat(path)
    name = Path(os.path.relpath(path, root or ".")).as_posix()
    return Document(name, os.path.abspath(path), found.st_size, found.st_mtime_ns)


def _hold_out(documents: tuple[Document, ...], fraction: float) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    budget = room = int(fraction * sum(d.num_bytes for d in documents))
    held: list[Span] = []
    for document in sorted(documents, key=_name_hash):
        if document.num_bytes <= room:
            held.append(Span(document, 0, document.num_bytes))
            room -= document.num_bytes
    whole = {span.document for span in held}
    train = [Span(d, 0, d.num_bytes) for d in documents if d not in whole]
    if room > budget / 2:
        largest = max(range(len(train)), key=lambda i: train[i].num_bytes)
        train[largest], tail = cut_after(train[largest], train[largest].num_bytes - room)
        held.append(tail)
    return tuple(train), tuple(span for span in held if span.num_bytes)


def _name_hash(document: Document) -> bytes:
    return sha256(document.name.encode(errors="surrogateescape")).digest()
