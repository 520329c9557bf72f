"""Logprobs as the two endpoints word them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from engine.checkpoint.tokenizer import Tokenizer
from engine.messages import TokenLogprob

LOWEST = -9999.0  # JSON has no -inf


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The token as text; one that is not whole characters as `bytes:\\xe2\\x80`, so that no two tokens look alike."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], logprobs: Iterable[TokenLogprob | None], offsets: list[int]
) -> dict[str, Any]:
    """Parallel lists; `top_logprobs` maps text to logprob and always has the chosen token. None: the first token."""
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for entry in logprobs:
        if entry is None:
            values.append(None)
            tops.append(None)
            continue
        values.append(finite(entry.logprob))
        top = {token_text(tokenizer, token): finite(value) for token, value in entry.top}
        top.setdefault(token_text(tokenizer, entry.token), finite(entry.logprob))
        tops.append(top)
    texts = [token_text(tokenizer, token) for token in tokens]
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def chat_logprobs(tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob]) -> dict[str, Any]:
    """`content`: one entry per token, each with the bytes it stands for."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(data)}

    content = []
    for item in logprobs:
        tops = [entry(token, logprob) for token, logprob in item.top]
        content.append({**entry(item.token, item.logprob), "top_logprobs": tops})
    return {"content": content, "refusal": None}
