"""Structured output: which tokens a grammar allows a sequence next, by llguidance. Imports no torch.

A grammar is text in llguidance's variant of Lark, or in its JSON. It is compiled, and each next mask is computed, in
threads beside the loop: the native code gives the interpreter free meanwhile.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
from collections.abc import Collection, Sequence

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from engine.checkpoint.tokenizer import Tokenizer
from engine.cores import roam, step_back
from engine.errors import RequestError

CACHED = 32  # compiled grammars that are kept
MASK_SECONDS = 2.0  # a mask takes microseconds; a grammar whose mask takes this long fails its request
MATCHERS = 4  # threads for masks: one is enough, unless a grammar goes wrong
LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
_AT_ONCE: concurrent.futures.Future[None] = concurrent.futures.Future()
_AT_ONCE.set_result(None)


class Guide:
    """Follows the generated tokens of one sequence. `mask`: int32 words, a bit for each token that is allowed next."""

    def __init__(self, matcher: LLMatcher, vocab_size: int):
        self.matcher, self.vocab_size = matcher, vocab_size
        self.mask = np.zeros(-(-vocab_size // 32), np.int32)
        self.ready = _AT_ONCE
        self.error: str | None = None

    def allowed(self, held: Collection[int] = ()) -> NDArray[np.bool_]:
        """`words`, a bool for each token."""
        words = self.words(held).view(np.uint8)
        return np.unpackbits(words, count=self.vocab_size, bitorder="little").view(np.bool_)

    def words(self, held: Collection[int] = ()) -> NDArray[np.int32]:
        """The mask of what may come next; waits for it. Nothing may once `error` is set. held: tokens that may not come
        while any other may."""
        try:
            self.ready.result(MASK_SECONDS)
            failed = self.matcher.is_error()
        except (TimeoutError, ValueError, RuntimeError):  # the last two are llguidance's
            failed = True
        if failed:
            self.error = "The grammar became too complex at this point of the text to be followed; simplify it."
            return np.zeros_like(self.mask)
        others = self.mask.copy()
        for token in held:
            others.view(np.uint32)[token // 32] &= ~np.uint32(1 << token % 32)
        return others if others.any() else self.mask


class Grammars:
    """Compiles for one tokenizer. vocab_size: of the model's logits. eos_ids: allowed where the grammar accepts."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]):
        self._source, self.vocab_size, self._eos_ids = tokenizer, vocab_size, list(eos_ids)
        self._compiled = functools.lru_cache(CACHED)(self._compile)
        self._compiling = concurrent.futures.ThreadPoolExecutor(2, "grammar", step_back)
        self._matching = concurrent.futures.ThreadPoolExecutor(MATCHERS, "mask", roam)

    def start(self, grammar: str) -> concurrent.futures.Future[Guide]:
        """Compiles in a thread that gives way to the steps of other requests."""
        if "_threads" not in vars(self):  # llguidance's own inherit the priority of who makes them
            self._matching.submit(lambda: self._threads).result()
        return self._compiling.submit(self.guide, grammar)

    def guide(self, grammar: str) -> Guide:
        """At the beginning of a text, its first mask computed. Raises RequestError for what is no grammar."""
        guide = Guide(self._compiled(grammar).deep_copy(), self.vocab_size)
        self._fill([guide])
        if guide.matcher.is_error():
            raise RequestError(_reason(guide.matcher.get_error()))
        return guide

    def advance(self, drawn: list[tuple[Guide, int]]) -> None:
        """Takes each sequence's next token; their next masks are computed together in a thread."""
        if drawn:
            ready = self._matching.submit(self._advance, drawn)
            for guide, _ in drawn:
                guide.ready = ready

    def _advance(self, drawn: list[tuple[Guide, int]]) -> None:
        self._threads.consume_token_par([(guide.matcher, token) for guide, token in drawn])
        self._fill([guide for guide, _ in drawn])

    def _fill(self, guides: list[Guide]) -> None:
        masks = np.zeros((len(guides), len(guides[0].mask)), np.int32)
        matchers = [(guide.matcher, row) for row, guide in enumerate(guides)]
        self._threads.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, masks.strides[0], len(guides))
        for guide, mask in zip(guides, masks, strict=True):
            guide.mask = mask

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self.vocabulary, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise RequestError(_reason(matcher.get_error()))
        return matcher

    def prepare(self) -> None:
        """Makes the vocabulary, if grammars can be followed at all. What fails will fail again, and the request that
        wants it be told."""
        if self._eos_ids:
            with contextlib.suppress(Exception):
                self.vocabulary  # noqa: B018

    @functools.cached_property
    def vocabulary(self) -> LLTokenizer:
        """The tokenizer as llguidance needs it. Made when first wanted: half a second and more of the interpreter's
        time, most of it without a break, so that no step is computed meanwhile."""
        wrapper = TokenizerWrapper(_Vocabulary(self._source, self.vocab_size, self._eos_ids))
        return LLTokenizer(wrapper, n_vocab=self.vocab_size, eos_token=self._eos_ids)

    @functools.cached_property
    def _threads(self) -> LLExecutor:
        return LLExecutor(1)


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: list[int]):
        if not eos_ids:
            raise RequestError("This model declares no end-of-sequence token, so that a grammar could never end.")
        self.eos_token_id, self.bos_token_id = eos_ids[0], tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(id) for id in range(vocab_size)]
        self.special_token_ids = [id for id in range(vocab_size) if tokenizer.is_special(id)]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of exactly these bytes: what a tokenizer puts before a text (SentencePiece: a space) is cut off, if
        need be with a control character between, which is a token of its own."""
        for before in ("", "\x02"):
            ids = self._tokenizer.encode(before + text.decode(), add_special_tokens=False, parse_special=False)
            data = [self._tokenizer.token_bytes(id) for id in ids]
            for start in range(3):
                if b"".join(data[start:]) == text:
                    return ids[start:]
        return []


def _reason(error: str) -> str:
    """llguidance's message in one line, without the state of its parser."""
    text = " ".join(error.split("<state>")[0].split("<backtrace>")[0].split())
    return "the grammar is too complex" if not text or text.startswith("panic") else text[:300]
