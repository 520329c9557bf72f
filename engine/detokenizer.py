"""Token ids -> text as they come: never half a character, never a stop string. Imports no torch; O(1) a token."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Iterable
from typing import Protocol

from engine.messages import Output, SamplingParams, TokenLogprob


class TokenText(Protocol):
    """What is needed of engine.checkpoint.tokenizer.Tokenizer."""

    def token_bytes(self, id: int, /) -> bytes: ...
    def is_special(self, id: int, /) -> bool: ...


class Detokenizer:
    """Incremental `Tokenizer.decode` of what follows a prompt: the pieces put together equal decoding all at once.

    Bytes that may still become a character are held back; what can no longer become one is U+FFFD. A first space stays
    (SentencePiece's `decode` takes it away at the start of a text, and this is never the start).
    """

    def __init__(self, tokenizer: TokenText, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Iterable[int]) -> str:
        """The text that these tokens make final."""
        return "".join(self.add_token(id)[0] for id in ids)

    def add_token(self, id: int) -> tuple[str, int]:
        """(text, start): `start` is where in `text` the token's first character begins; what is before comes from bytes
        held back earlier. A token that only continues a character starts where that character does."""
        if self._skip_special and self._tokenizer.is_special(id):
            return "", 0
        data = self._tokenizer.token_bytes(id)
        if not self._decoder.getstate()[0]:
            return self._decoder.decode(data), 0
        head = self._decoder.decode(data[:1])
        start = len(head) if self._decoder.getstate()[0] else len(head) - 1
        return head + self._decoder.decode(data[1:]), max(start, 0)

    def finish(self) -> str:
        """The rest: U+FFFD for bytes that did not become a character, else nothing."""
        return self._decoder.decode(b"", final=True)


class StopChecker:
    """Cuts a stream of text at the first stop string to be completed, and holds back what may be the beginning of one.

    The result does not depend on how the text was cut into pieces. Of several that end together the longest counts.
    """

    def __init__(self, stops: tuple[str, ...], include: bool = False):
        self._stops = stops
        self._include = include
        self._held = ""

    def add(self, text: str) -> tuple[str, str | None]:
        """(text that may be shown, the stop string that was found or None)."""
        if not self._stops or not text:
            return text, None
        text = self._held + text
        found = [(at + len(stop), -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, _, stop = min(found)
            self._held = ""
            return text[: end if self._include else end - len(stop)], stop
        keep = self._possible_beginning(text)
        self._held = text[keep:]
        return text[:keep], None

    def finish(self) -> str:
        """What was held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Index of the longest tail of `text` that begins a stop string; len(text) if there is none."""
        best = len(text)
        for stop in self._stops:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= at < best:
                if stop.startswith(text[at:]):
                    best = at
                    break
                at = text.find(stop[0], at + 1)
        return best


@dataclasses.dataclass(slots=True)
class TextDelta:
    """What an Output adds to a reply. `tokens`, `logprobs` and `offsets` (characters into the whole text) go together;
    the text of the last tokens may come with a later delta. finish_reason as in Output, set in the last one."""

    text: str
    tokens: list[int]
    offsets: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    cancel: bool = False  # a stop string ended it here, the engine is still at it: cancel the request


class OutputText:
    """The text of one request from its Outputs, with stop strings, special tokens and offsets handled."""

    def __init__(self, tokenizer: TokenText, params: SamplingParams):
        self._params = params
        self._detokenizer = Detokenizer(tokenizer, params.skip_special_tokens)
        self._stop = StopChecker(params.stop, params.include_stop_str_in_output)
        self._decoded = 0  # characters out of the detokenizer
        self.num_tokens = 0  # up to and with the one that completed a stop string or was a stop token

    def add(self, output: Output) -> TextDelta:
        """Feeds one Output; nothing may be fed after a delta that has a finish_reason."""
        delta = TextDelta("", [], [], None, output.finish_reason, output.stop_reason)
        last = len(output.tokens) - 1
        stopped = False
        for i, token in enumerate(output.tokens):
            self.num_tokens += 1
            delta.tokens.append(token)
            if i == last and output.finish_reason == "stop" and not self._params.include_stop_str_in_output:
                delta.offsets.append(self._decoded)  # a stop token has no text of its own
                break
            text, start = self._detokenizer.add_token(token)
            delta.offsets.append(self._decoded + start)
            stopped = self._show(delta, text)
            if stopped:
                delta.cancel = output.finish_reason is None
                break
        if output.finish_reason is not None and not stopped and not self._show(delta, self._detokenizer.finish()):
            delta.text += self._stop.finish()
        if output.logprobs is not None:
            delta.logprobs = output.logprobs[: len(delta.tokens)]
        return delta

    def _show(self, delta: TextDelta, text: str) -> bool:
        """Adds what may be shown of `text` to the delta; True if a stop string ended the reply."""
        self._decoded += len(text)
        if self.num_tokens <= self._params.min_tokens:
            delta.text += text
            return False
        shown, stop = self._stop.add(text)
        delta.text += shown
        if stop is not None:
            delta.finish_reason, delta.stop_reason = "stop", stop
        return stop is not None
