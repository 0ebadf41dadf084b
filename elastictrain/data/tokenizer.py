"""The tokenizer: byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2, Radford et al. 2019).

Of the corpus itself, or the one that comes with a model. Every byte has a token, so any text encodes and decodes to
itself, and every token stands for known bytes: that is what makes bits per byte exact. One special token stands before
each text, in our own `<|endoftext|>`, id 0; where the characters of a special token stand in a text, they are read as
text. Training is deterministic: 0.7 s for 4 MB; encoding runs at 4 MB/s on one core.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from elastictrain.config import TrainConfig
from elastictrain.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
"""Of a tokenizer that is trained here, and wherever a tokenizer_config.json does not name another `eos_token`."""
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

# The library's threads gain nothing here, and it warns on every fork after using them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, content: str, end_of_text: str = END_OF_TEXT) -> None:
        """Raises ValueError for a tokenizer that can't serve."""
        self.json = content
        """The content of tokenizer.json, in the format of Hugging Face `tokenizers`."""
        self.end_of_text = end_of_text
        """The token before each text."""
        self._model = tokenizers.Tokenizer.from_str(content)
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()
        end_of_text_id = self._model.token_to_id(end_of_text)
        if end_of_text_id is None:
            raise ValueError(f"it has no token {end_of_text!r} to stand between texts: name its eos_token")
        if "ByteLevel" not in json.dumps(json.loads(content).get("decoder")):
            raise ValueError("it is not byte-level, as those of GPT-2, Llama 3 and Qwen are")
        self.end_of_text_id: int = end_of_text_id

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """The BPE of these texts; it has fewer than `vocab_size` tokens where they hold too few pairs to merge."""
        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        return cls(model.to_str(pretty=True))

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a tokenizer.json, and from a tokenizer_config.json beside it what its end of text is."""
        try:
            return cls(path.read_text(encoding="utf-8"), _end_of_text(path.with_name(TOKENIZER_CONFIG_NAME)))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"can't use the tokenizer {path}: {error}") from error

    def files(self) -> dict[str, str]:
        """What `load`, and Hugging Face `transformers`, read: contents by file name."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.end_of_text,
            "clean_up_tokenization_spaces": False,
        }
        return {TOKENIZER_NAME: self.json, TOKENIZER_CONFIG_NAME: json.dumps(config, indent=2) + "\n"}

    def sha256(self) -> str:
        """Digest of tokenizer.json, hex."""
        return sha256(self.json.encode()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """Ids are below it."""
        return 1 + max(self._model.get_vocab().values())

    def encode(self, text: str) -> list[int]:
        """Token ids of the text."""
        ids: list[int] = self._model.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, special tokens and ids beyond the vocabulary left out."""
        return b"".join(self.token_bytes[i] for i in ids if i < self.vocab_size).decode(errors="replace")

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """What each token stands for; special ones, and ids that are not in use, stand for none."""
        alphabet = _byte_of_character()
        added = {token.content: token.special for token in self._model.get_added_tokens_decoder().values()}
        found = [b""] * self.vocab_size
        for token, number in self._model.get_vocab().items():
            if token not in added:
                found[number] = bytes(alphabet[c] for c in token)
            elif not added[token]:
                found[number] = token.encode()
        return tuple(found)


def given_tokenizer(config: TrainConfig) -> Tokenizer | None:
    """The tokenizer that the config names: data.tokenizer, or that of a Hugging Face model's folder; else None.

    Raises ConfigError when it is not there, or can't serve.
    """
    named, path = config.data.tokenizer, Path(config.data.tokenizer or config.model.path or "")
    if named is None and (config.model.path is None or config.model.kind == "own"):
        return None
    file = path / TOKENIZER_NAME if path.is_dir() else path
    if named is None and not file.is_file():
        return None
    field = "data.tokenizer" if named else "model.path"
    try:
        return Tokenizer.load(file)
    except DataError as error:
        raise ConfigError(f"{field} {path}: {error}") from None


def _end_of_text(path: Path) -> str:
    if not path.is_file():
        return END_OF_TEXT
    token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    return str(token["content"] if isinstance(token, dict) else token or END_OF_TEXT)


def _byte_of_character() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE writes for bytes (the same table as GPT-2's)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (b for b in range(256) if b not in printable)
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
