"""Texts of a wanted number of tokens, made of one language model's own words."""

from __future__ import annotations

import importlib.resources
import random
import re
from pathlib import Path

from engine.checkpoint import Tokenizer, open_checkpoint
from engine.errors import FenError

WORD = re.compile(rb" [a-z]{2,}")


class Vocabulary:
    """Makes texts and counts tokens. name: where the tokenizer comes from; None: there is none, and words stand for
    tokens, roughly."""

    def __init__(self, name: str | None, tokenizer: Tokenizer | None):
        self.name, self._tokenizer = name, tokenizer
        prose = importlib.resources.files("seeds").joinpath("README.md").read_text(encoding="utf-8")
        self._words = sorted({f" {word}" for word in re.findall("[a-z]{3,}", prose)})
        if tokenizer is not None:
            parts = (tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size))
            words = [part.decode() for part in parts if WORD.fullmatch(part)]
            self._words = [word for word in words if len(tokenizer.encode(word, False)) == 1] or self._words

    @property
    def exact(self) -> bool:
        return self._tokenizer is not None

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, False)) if self._tokenizer else len(text.split())

    def text(self, tokens: int, draw: random.Random) -> str:
        """Random words that are `tokens` tokens long."""
        words = draw.choices(self._words, k=tokens)
        text = "".join(words)
        for _ in range(8):
            extra = self.count(text) - tokens
            if extra == 0:
                break
            words = words[:-extra] if extra > 0 else words + draw.choices(self._words, k=-extra)
            text = "".join(words)
        return text


def open_vocabulary(tokenizer: str | None, model: str) -> Vocabulary:
    """Of `tokenizer` (a tokenizer.json, a folder with one, a checkpoint, a short name or a Hugging Face id that is in
    the cache), or of the served model's name if it is one of these; else one of plain words. FenError: `tokenizer` was
    named and cannot be opened."""
    for name in (tokenizer, None if tokenizer else model):
        if name is None:
            continue
        try:
            return Vocabulary(name, _open(name))
        except FenError:
            if tokenizer:
                raise
    return Vocabulary(None, None)


def _open(name: str) -> Tokenizer:
    import tokenizers

    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.name == "tokenizer.json" and file.is_file():
        try:
            return Tokenizer(tokenizers.Tokenizer.from_file(str(file)))
        except Exception as error:  # the library raises bare Exception
            raise FenError(f"--tokenizer: {file} cannot be read: {error}") from None
    return open_checkpoint(name).tokenizer
