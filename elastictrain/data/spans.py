"""Ranges of documents: how text of any shape is cut into parts of a wanted size.

A document is a file as it was when found; a span is a byte range of one. Cuts fall behind a line end, or, in lines of
more than 64 KiB, between two UTF-8 characters. They follow from sizes and bytes alone, so every process cuts alike.
Finding a cut reads at most 64 KiB.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from elastictrain.errors import DataError

_WINDOW_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Document:
    """A file of the corpus, as it was when found."""

    name: str
    """Path relative to the corpus, with forward slashes."""
    path: str
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes [start, stop) of a document."""

    document: Document
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Length of the range."""
        return self.stop - self.start


def read(span: Span) -> bytes:
    """The span's bytes; raises DataError when the document can't be read or is not as it was found."""
    document = span.document
    try:
        with open(document.path, "rb") as file:
            file.seek(span.start)
            data = file.read(span.num_bytes)
            now = os.fstat(file.fileno())
    except OSError as error:
        raise DataError(
            f"can't read {document.path}: {error.strerror}. Every node must be able to read data.corpus; "
            f"data.exclude leaves folders out."
        ) from None
    if (now.st_size, now.st_mtime_ns) != (document.num_bytes, document.mtime_ns):
        raise DataError(f"{document.path} changed while it was being read: submit again when data.corpus is at rest")
    return data


def cut_after(span: Span, num_bytes: int) -> tuple[Span, Span]:
    """The span in two, the first part of at least `num_bytes` and up to the next line end; either may be empty."""
    at = min(max(span.start, span.start + num_bytes), span.stop)
    if span.start < at < span.stop:
        at += _cut(read(Span(span.document, at - 1, min(at + _WINDOW_BYTES, span.stop))))
    return Span(span.document, span.start, at), Span(span.document, at, span.stop)


def pieces(span: Span, num_bytes: int) -> Iterator[Span]:
    """The span in pieces of `num_bytes` or slightly more, for what must fit into memory."""
    while span.num_bytes:
        piece, span = cut_after(span, num_bytes)
        yield piece


def partition(spans: Sequence[Span], parts: int) -> list[tuple[Span, ...]]:
    """The spans, in their order, in at most `parts` groups of nearly equal bytes; none is empty."""
    total = sum(s.num_bytes for s in spans)
    groups: list[list[Span]] = [[]]
    grouped = 0
    for span in spans:
        rest = span
        while len(groups) < parts and grouped + rest.num_bytes > (bound := total * len(groups) // parts):
            head, rest = cut_after(rest, bound - grouped)
            if head.num_bytes:
                groups[-1].append(head)
                grouped += head.num_bytes
            groups.append([])
        if rest.num_bytes:
            groups[-1].append(rest)
            grouped += rest.num_bytes
    return [tuple(group) for group in groups if group]


def _cut(window: bytes) -> int:
    """Where to cut, counted from the window's second byte, so that a line end just before it counts."""
    line_end = window.find(b"\n")
    if line_end >= 0:
        return line_end
    return next((i for i, byte in enumerate(window[1:]) if byte & 0xC0 != 0x80), len(window) - 1)
