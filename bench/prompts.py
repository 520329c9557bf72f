"""Prompts of an exact number of tokens, made of this project's own prose, and the longer texts of bench/texts/."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from engine.checkpoint import Tokenizer
from engine.errors import FenError


def prose_tokens(tokenizer: Tokenizer) -> list[int]:
    """The token ids of the digest in seeds/."""
    text = importlib.resources.files("seeds").joinpath("README.md").read_text(encoding="utf-8")
    return tokenizer.encode(text, add_special_tokens=False)


def text_of(path: Path | None, option: str, shipped: str) -> str:
    """The user's file, given by `option`, or one of bench/texts/. Raises FenError."""
    if path is None:
        return importlib.resources.files("bench").joinpath("texts", shipped).read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FenError(f"{option} {path} cannot be read as text: {error}") from None


def make_prompt(prose: list[int], length: int, offset: int = 0) -> list[int]:
    """`length` ids of `prose` from `offset` on, from its beginning again where it ends."""
    return [prose[(offset + i) % len(prose)] for i in range(length)]
