"""Which documents a corpus means, what is held out, and what is said when it is wrong."""

import os
from pathlib import Path

import pytest

from elastictrain.config import DataSection
from elastictrain.data.corpus import Corpus, find_documents
from elastictrain.data.spans import read
from elastictrain.errors import DataError

LINE = b"the quick brown fox jumps over the lazy dog\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, lines in {"b.py": 90, "a.py": 40, "sub/c.md": 30, "sub/tests/d.py": 50, "e.bin": 10}.items():
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(LINE * lines)
    (tmp_path / "texts" / "empty.py").touch()
    return tmp_path / "texts"


def names(corpus: Corpus) -> list[str]:
    return [d.name for d in corpus.documents]


def text(corpus: Corpus, part: str) -> bytes:
    return b"".join(read(span) for span in getattr(corpus, part))


def test_a_folder_is_read_by_suffix_without_excluded_folders(folder: Path) -> None:
    corpus = find_documents(DataSection(corpus=str(folder), validation_fraction=0.2))
    assert names(corpus) == ["a.py", "b.py", "sub/c.md"]
    assert corpus.num_empty == 1
    assert corpus.num_bytes == len(LINE) * 160


def test_a_glob_takes_what_it_matches(folder: Path) -> None:
    corpus = find_documents(DataSection(corpus=str(folder / "**" / "*.[pb]*"), exclude=(), validation_fraction=0.2))
    assert names(corpus) == ["a.py", "b.py", "e.bin", "sub/tests/d.py"]
    excluded = find_documents(DataSection(corpus=str(folder / "**" / "*.[pb]*"), validation_fraction=0.2))
    assert names(excluded) == ["a.py", "b.py", "e.bin"]


def test_a_relative_path_is_as_good(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absolute = find_documents(DataSection(corpus=str(folder), validation_fraction=0.2))
    monkeypatch.chdir(folder.parent)
    for corpus in ("texts", "texts/*.py"):
        assert set(find_documents(DataSection(corpus=corpus, validation_fraction=0.2)).documents) <= set(
            absolute.documents
        )


def test_the_standard_library_is_found_without_its_tests() -> None:
    corpus = find_documents(DataSection())
    assert corpus.num_bytes > 8_000_000
    assert "json/decoder.py" in names(corpus)
    assert not [name for name in names(corpus) if "test" in name.split("/") or "site-packages" in name]
    held = sum(s.num_bytes for s in corpus.validation) / corpus.num_bytes
    assert 0.019 < held <= 0.02


def test_nothing_is_both_trained_on_and_held_out(folder: Path) -> None:
    for fraction in (0.05, 0.2, 0.4):
        corpus = find_documents(DataSection(corpus=str(folder), validation_fraction=fraction))
        train, validation = text(corpus, "train"), text(corpus, "validation")
        assert len(train) + len(validation) == corpus.num_bytes
        assert fraction * corpus.num_bytes / 2 - len(LINE) <= len(validation) <= fraction * corpus.num_bytes


def test_the_end_of_a_single_file_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "book.text"
    path.write_bytes(b"".join(b"line %d\n" % i for i in range(1000)))
    corpus = find_documents(DataSection(corpus=str(path), validation_fraction=0.1, seq_len=8))
    assert text(corpus, "train") + text(corpus, "validation") == path.read_bytes()
    assert text(corpus, "validation").startswith(b"line 9")
    assert 0.09 < len(text(corpus, "validation")) / path.stat().st_size <= 0.1


def test_the_digest_follows_names_and_contents(folder: Path) -> None:
    data = DataSection(corpus=str(folder), validation_fraction=0.2)
    before = find_documents(data).sha256()
    os.utime(folder / "a.py", (1, 1))
    assert find_documents(data).sha256() == before
    (folder / "a.py").write_bytes(LINE * 39 + LINE.swapcase())
    after = find_documents(data).sha256()
    assert after != before
    (folder / "a.py").rename(folder / "z.py")
    assert find_documents(data).sha256() != after


def test_a_document_that_changes_while_it_is_read_is_told(folder: Path) -> None:
    corpus = find_documents(DataSection(corpus=str(folder), validation_fraction=0.2))
    (folder / "b.py").write_bytes(LINE * 91)
    with pytest.raises(DataError, match=r"b\.py changed while it was being read"):
        corpus.sha256()


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("texst", r"data\.corpus .*texst is not there\. Did you mean .*/texts\?"),
        ("nowhere/at/all", r"is not there\. There is no nowhere in "),
        ("texts/*.toml", r"texts/\*\.toml matches no file"),
        ("texts/empty.py", r"holds no text: .*empty\.py is empty"),
        ("texts/e.bin/x", r"e\.bin/x is not there"),
    ],
)
def test_a_wrong_corpus_is_told_at_once(folder: Path, corpus: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_documents(DataSection(corpus=str(folder.parent / corpus)))


def test_a_folder_without_text_names_the_knobs(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no file that ends in \.rst \(data\.suffixes\).*\(data\.exclude\)"):
        find_documents(DataSection(corpus=str(folder), suffixes=(".rst",)))


def test_only_empty_files_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.py").touch()
    (tmp_path / "b.py").touch()
    with pytest.raises(DataError, match="all 2 files are empty"):
        find_documents(DataSection(corpus=str(tmp_path)))


def test_what_is_no_file_is_refused() -> None:
    with pytest.raises(DataError, match="neither a file nor a folder"):
        find_documents(DataSection(corpus=os.devnull))


@pytest.mark.parametrize(("lines", "part"), [(2, "training"), (10, "validation")])
def test_too_little_text_is_told(tmp_path: Path, lines: int, part: str) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(LINE * lines)
    with pytest.raises(DataError, match=rf"too little text: \d+ bytes for {part}, and one sample takes 129 tokens"):
        find_documents(DataSection(corpus=str(path)))
