"""The tokenizer: byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2, Radford et al. 2019) of the corpus itself.

Every byte has a token, so any text encodes and decodes to itself, and every token stands for known bytes: that is
what makes bits per byte exact. The only special token is `<|endoftext|>`, id 0; where those characters stand in a
text, they are read as text. Training is deterministic: 0.7 s for 4 MB; encoding runs at 4 MB/s on one core.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from elastictrain.errors import DataError

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0

# The library's threads gain nothing here, and it warns on every fork after using them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, content: str) -> None:
        self.json = content
        """The content of tokenizer.json, in the format of Hugging Face `tokenizers`."""
        self._model = tokenizers.Tokenizer.from_str(content)
        self._model.encode_special_tokens = True

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
        """Read a tokenizer.json."""
        try:
            return cls(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"can't read the tokenizer {path}: {error}. Submit again to have it made anew.") from error

    def sha256(self) -> str:
        """Digest of tokenizer.json, hex."""
        return sha256(self.json.encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Tokens that there are; ids are below it."""
        size: int = self._model.get_vocab_size()
        return size

    def encode(self, text: str) -> list[int]:
        """Token ids of the text."""
        ids: list[int] = self._model.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, `<|endoftext|>` and ids beyond the vocabulary left out."""
        return b"".join(self.token_bytes[i] for i in ids if i < self.vocab_size).decode(errors="replace")

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """What each token stands for; `<|endoftext|>` stands for none."""
        alphabet = _byte_of_character()
        vocabulary: dict[str, int] = self._model.get_vocab()
        tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        return tuple(b"" if t == END_OF_TEXT else bytes(alphabet[c] for c in t) for t in tokens)


def _byte_of_character() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE writes for bytes (the same table as GPT-2's)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (b for b in range(256) if b not in printable)
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
