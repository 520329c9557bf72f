"""Prompts of an exact number of tokens, made of this project's own prose."""

from __future__ import annotations

import importlib.resources

from engine.checkpoint import Tokenizer


def prose_tokens(tokenizer: Tokenizer) -> list[int]:
    """The token ids of the digest in seeds/."""
    text = importlib.resources.files("seeds").joinpath("README.md").read_text(encoding="utf-8")
    return tokenizer.encode(text, add_special_tokens=False)


def make_prompt(prose: list[int], length: int, offset: int = 0) -> list[int]:
    """`length` ids of `prose` from `offset` on, from its beginning again where it ends."""
    return [prose[(offset + i) % len(prose)] for i in range(length)]
