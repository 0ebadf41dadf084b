"""Any text survives the tokenizer, and every token stands for known bytes."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.data.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, Tokenizer
from elastictrain.errors import DataError

TEXT = Path(subprocess.__file__).read_text(encoding="utf-8")
TOKENIZER = Tokenizer.train([TEXT], 512)


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert b"".join(TOKENIZER.token_bytes[i] for i in ids) == text.encode()


def test_it_compresses() -> None:
    assert len(TOKENIZER.encode(TEXT)) < len(TEXT) / 2
    assert TOKENIZER.vocab_size == 512


def test_end_of_text_is_no_text() -> None:
    assert TOKENIZER.token_bytes[END_OF_TEXT_ID] == b""
    ids = TOKENIZER.encode(f"a{END_OF_TEXT}b")
    assert END_OF_TEXT_ID not in ids
    assert TOKENIZER.decode(ids) == f"a{END_OF_TEXT}b"
    assert TOKENIZER.decode([END_OF_TEXT_ID, *ids, END_OF_TEXT_ID, 5000]) == f"a{END_OF_TEXT}b"


def test_a_loaded_one_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZER.json, encoding="utf-8")
    loaded = Tokenizer.load(path)
    assert loaded.sha256() == TOKENIZER.sha256()
    assert loaded.encode(TEXT) == TOKENIZER.encode(TEXT)


def test_little_text_makes_a_smaller_vocabulary() -> None:
    small = Tokenizer.train(["aaaa bbbb"], 2048)
    assert 257 < small.vocab_size < 300
    assert len(small.token_bytes) == small.vocab_size


def test_training_is_deterministic_across_processes() -> None:
    program = (
        "import subprocess, pathlib; from elastictrain.data.tokenizer import Tokenizer; "
        "print(Tokenizer.train([pathlib.Path(subprocess.__file__).read_text(encoding='utf-8')], 512).sha256())"
    )
    for parallelism in ("true", "false"):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env={"TOKENIZERS_PARALLELISM": parallelism, "PYTHONPATH": ":".join(p for p in sys.path if p)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == TOKENIZER.sha256()


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZER.json[:-500], encoding="utf-8")
    with pytest.raises(DataError, match=r"can't read the tokenizer .*tokenizer\.json"):
        Tokenizer.load(path)
