"""Any text survives the tokenizer, and every token stands for known bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.config import TrainConfig
from elastictrain.data.tokenizer import END_OF_TEXT, Tokenizer, given_tokenizer
from elastictrain.errors import ConfigError, DataError

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
    assert TOKENIZER.token_bytes[TOKENIZER.end_of_text_id] == b""
    ids = TOKENIZER.encode(f"a{END_OF_TEXT}b")
    assert TOKENIZER.end_of_text_id not in ids
    assert TOKENIZER.decode(ids) == f"a{END_OF_TEXT}b"
    assert TOKENIZER.decode([TOKENIZER.end_of_text_id, *ids, TOKENIZER.end_of_text_id, 5000]) == f"a{END_OF_TEXT}b"


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
    with pytest.raises(DataError, match=r"can't use the tokenizer .*tokenizer\.json"):
        Tokenizer.load(path)


def foreign(folder: Path, end_of_text: str = "<|end|>", byte_level: bool = True) -> Path:
    """A tokenizer as it comes with a model: other special tokens, at the end of the vocabulary, with a gap."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else None
    model.decoder = decoders.ByteLevel() if byte_level else decoders.BPEDecoder()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    model.add_special_tokens(["<|start|>", end_of_text])
    model.add_tokens(["subprocess.Popen"])
    model.enable_truncation(16)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(model.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": end_of_text}}))
    return folder


def test_a_models_own_tokenizer_serves(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "model")
    found = Tokenizer.load(folder / "tokenizer.json")
    assert (found.end_of_text, found.end_of_text_id) == ("<|end|>", 401)
    assert found.vocab_size == 403 == len(found.token_bytes)
    ids = found.encode(TEXT)
    assert len(ids) > 1000, "nothing is cut off"
    assert b"".join(found.token_bytes[i] for i in ids) == TEXT.encode()
    assert found.decode([401, *ids]) == TEXT
    assert 401 not in found.encode("<|end|>")
    kept = tmp_path / "kept"
    kept.mkdir()
    for name, content in found.files().items():
        (kept / name).write_text(content)
    again = Tokenizer.load(kept / "tokenizer.json")
    assert (again.sha256(), again.end_of_text_id) == (found.sha256(), 401)


@pytest.mark.parametrize("named", ["folder", "file", "model"])
def test_which_tokenizer_a_config_means(tmp_path: Path, named: str) -> None:
    folder = foreign(tmp_path / "model")
    (folder / "config.json").write_text("{}")
    fields = {
        "folder": {"data": {"tokenizer": str(folder)}},
        "file": {"data": {"tokenizer": str(folder / "tokenizer.json")}},
        "model": {"model": {"kind": "huggingface", "path": str(folder)}},
    }
    given = given_tokenizer(TrainConfig.from_dict(fields[named]))
    assert given is not None
    assert given.end_of_text == "<|end|>"
    (folder / "tokenizer.json").unlink()
    if named == "model":
        assert given_tokenizer(TrainConfig.from_dict(fields[named])) is None
    else:
        with pytest.raises(ConfigError, match=r"data\.tokenizer"):
            given_tokenizer(TrainConfig.from_dict(fields[named]))
    assert given_tokenizer(TrainConfig.from_dict({})) is None


def test_a_tokenizer_that_can_not_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not byte-level"):
        given_tokenizer(TrainConfig.from_dict({"data": {"tokenizer": str(foreign(tmp_path / "a", byte_level=False))}}))
    folder = foreign(tmp_path / "b")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r"no token '<\|endoftext\|>' to stand between texts"):
        given_tokenizer(TrainConfig.from_dict({"data": {"tokenizer": str(folder)}}))
