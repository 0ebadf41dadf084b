"""Documents are cut without losing or doubling a byte, at line ends where there are any."""

from pathlib import Path

import pytest

from elastictrain.data.spans import Document, Span, cut_after, partition, pieces, read
from elastictrain.errors import DataError


def document(path: Path, content: bytes) -> Span:
    path.write_bytes(content)
    found = path.stat()
    return Span(Document(path.name, str(path), found.st_size, found.st_mtime_ns), 0, found.st_size)


def test_pieces_end_at_line_ends(tmp_path: Path) -> None:
    content = b"".join(b"line number %d\n" % i for i in range(500))
    parts = [read(piece) for piece in pieces(document(tmp_path / "a", content), 100)]
    assert b"".join(parts) == content
    assert all(part.endswith(b"\n") and 100 <= len(part) < 120 for part in parts[:-1])


def test_a_cut_at_a_line_end_stays_there(tmp_path: Path) -> None:
    head, tail = cut_after(document(tmp_path / "a", b"one\ntwo\n"), 4)
    assert (read(head), read(tail)) == (b"one\n", b"two\n")


def test_a_long_line_is_cut_between_characters(tmp_path: Path) -> None:
    content = b"x" + "é€😀".encode() * 30_000
    parts = [read(piece) for piece in pieces(document(tmp_path / "a", content), 10_000)]
    assert b"".join(parts) == content
    assert len(parts) > 20
    assert all(part.decode() for part in parts)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 1000])
def test_parts_are_even_and_hold_everything_in_order(tmp_path: Path, parts: int) -> None:
    sizes = [300, 5, 20_000, 40, 1, 900]
    spans = [document(tmp_path / str(i), b"0123456789abcde\n" * size) for i, size in enumerate(sizes)]
    groups = partition(spans, parts)
    assert b"".join(read(s) for group in groups for s in group) == b"".join(read(s) for s in spans)
    assert all(group and all(s.num_bytes for s in group) for group in groups)
    share = sum(s.num_bytes for s in spans) / parts
    assert len(groups) == parts
    assert all(abs(sum(s.num_bytes for s in group) - share) <= 32 for group in groups)


def test_more_parts_than_lines_leaves_none_empty(tmp_path: Path) -> None:
    groups = partition([document(tmp_path / "a", b"a\nb\nc\n" + b"d" * 50)], 30)
    assert b"".join(read(s) for group in groups for s in group) == b"a\nb\nc\n" + b"d" * 50
    assert all(s.num_bytes for group in groups for s in group)


def test_a_document_that_is_gone_is_told(tmp_path: Path) -> None:
    span = document(tmp_path / "a.txt", b"text")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"can't read .*a\.txt: No such file"):
        read(span)
