"""Offline use: `LLM("smollm2-135m-instruct").generate("Hello")`, the same engine in this process."""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from engine.chat import encode_chat
from engine.core.build import build_core
from engine.detokenizer import OutputText, TextDelta
from engine.errors import FenError, RequestError
from engine.messages import EngineInfo, EngineOptions, Output, Request, SamplingParams, TokenLogprob

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int]

_RANGES = {
    "max_tokens": (1, math.inf),
    "min_tokens": (0, math.inf),
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),  # 0 itself is refused below
    "top_k": (0, math.inf),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.0, 10.0),  # 0 itself is refused below
    "seed": (-(2**63), 2**63 - 1),
    "logprobs": (0, 20),
    "prompt_logprobs": (0, 20),
}


@dataclasses.dataclass(slots=True)
class Completion:
    """text: without the stop string. tokens: with the stop token. logprobs: one per token, if they were asked for.

    finish_reason: "stop" | "length" | "error", then `error` is a sentence. stop_reason: the stop string or token id.
    """

    prompt: list[int]
    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cached_tokens: int = 0
    error: str | None = None


class LLM:
    """A model, loaded and ready. One call at a time; prompts given to one call run together.

    options: the fields of engine.messages.EngineOptions. `on_progress(stage, fraction)` follows the loading.
    Raises CheckpointError or CapacityError.
    """

    def __init__(
        self,
        model: str = "smollm2-135m-instruct",
        *,
        on_progress: Callable[[str, float], None] | None = None,
        **options: Any,
    ):
        values = msgspec.to_builtins(EngineOptions(model=model, **options))
        try:
            self.options = msgspec.convert(values, EngineOptions)  # checks the types
        except msgspec.ValidationError as error:
            raise FenError(f"an option has the wrong type: {error}") from None
        core, info, checkpoint = build_core(self.options, on_progress)
        self._core = core
        self.info: EngineInfo = info
        self.tokenizer = checkpoint.tokenizer
        self.chat_template = checkpoint.chat_template
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._closed = False

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Completes one prompt or several, given as text or as token ids; the results are in their order.

        params: for all, or one for each. Raises RequestError for what can never be served; a request that fails
        while it is computed has finish_reason "error", the others are not touched.
        """
        encoded = [self._encode(prompt) for prompt in _several(prompts)]
        each = [params or SamplingParams()] * len(encoded) if not isinstance(params, Sequence) else list(params)
        return self._complete(encoded, each)

    def chat(
        self, messages: Messages | Sequence[Messages], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Answers one conversation, [{"role": "user", "content": "..."}], or several, by the checkpoint's template.

        Without params an answer may take the rest of the context.
        """
        conversations: Any = [messages] if len(messages) > 0 and isinstance(messages[0], Mapping) else messages
        encoded = [encode_chat(self.chat_template, conversation, self.tokenizer) for conversation in conversations]
        if isinstance(params, Sequence):
            return self._complete(encoded, list(params))
        room = self.info.max_model_len
        return self._complete(encoded, [params or SamplingParams(max_tokens=max(room - len(p), 1)) for p in encoded])

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The completion of one prompt in pieces, as it comes. Leaving early cancels it."""
        for _, output, delta in self._run([self._encode(prompt)], [params or SamplingParams()]):
            if output.error is not None:
                raise FenError(output.error)
            if delta.text:
                yield delta.text

    def close(self) -> None:
        """Frees weights and KV cache."""
        if not self._closed:
            self._closed = True
            del self._core

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(self, prompt: Prompt) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        size = self.info.vocab_size
        for id in ids:
            if not isinstance(id, int) or not 0 <= id < size:
                raise RequestError(f"the prompt has the token id {id!r}; allowed: 0 to {size - 1}", param="prompt")
        if not ids:
            raise RequestError("the prompt is empty; give at least one token", param="prompt")
        return ids

    def _complete(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Completion]:
        results = [Completion(prompt) for prompt in prompts]
        for i, output, delta in self._run(prompts, params):
            result = results[i]
            result.text += delta.text
            result.tokens += delta.tokens
            if delta.logprobs is not None:
                result.logprobs = (result.logprobs or []) + delta.logprobs
            if output.prompt_logprobs is not None:
                result.prompt_logprobs = output.prompt_logprobs
            result.cached_tokens = result.cached_tokens or output.cached_tokens
            result.finish_reason, result.stop_reason = delta.finish_reason, delta.stop_reason
            result.error = output.error
        return results

    def _run(self, prompts: list[list[int]], params: list[SamplingParams]) -> Iterator[tuple[int, Output, TextDelta]]:
        """(index of the prompt, output, its text) until all are finished."""
        if len(prompts) != len(params):
            raise RequestError(f"there are {len(prompts)} prompts and {len(params)} params", param="params")
        for each in params:
            check(each, self.info.vocab_size)
        if self._closed:
            raise FenError("this LLM is closed")
        if not self._lock.acquire(blocking=False):
            raise FenError("this LLM is busy with another call: let it finish (or close its stream) first")
        core = self._core
        live: dict[str, tuple[int, OutputText]] = {}
        try:
            for i, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
                request = Request(id=f"{next(self._ids)}", prompt=prompt, params=each, arrival=time.monotonic())
                core.add(request)
                live[request.id] = i, OutputText(self.tokenizer, each)
            while live:
                for output in core.step():
                    if output.id not in live:
                        continue  # cancelled at a stop string while one more token was on the way
                    i, text = live[output.id]
                    delta = text.add(output)
                    if delta.finish_reason is not None:
                        del live[output.id]
                    if delta.cancel:
                        core.finish(output.id, text.num_tokens, output.device_seconds or {})
                    yield i, output, delta
        finally:
            core.cancel(list(live))
            while core.has_work:
                core.step()
            self._lock.release()


def check(params: SamplingParams, vocab_size: int) -> None:
    """Raises RequestError naming the first field that is out of range."""
    for name, (low, high) in _RANGES.items():
        value = getattr(params, name)
        if value is not None and not (isinstance(value, int | float) and low <= value <= high):
            raise RequestError(f"{name} is {value!r}; allowed: {low} to {high}", param=name)
    for name in ("top_p", "repetition_penalty"):
        if getattr(params, name) == 0:
            raise RequestError(f"{name} is 0; it must be more than 0", param=name)
    if any(not isinstance(stop, str) or not stop for stop in params.stop) or isinstance(params.stop, str):
        raise RequestError("stop has an empty string or is not a tuple of strings", param="stop")
    for name in ("stop_token_ids", "logit_bias"):
        for id in getattr(params, name):
            if not isinstance(id, int) or not 0 <= id < vocab_size:
                raise RequestError(f"{name} has the token id {id!r}; allowed: 0 to {vocab_size - 1}", param=name)
    for bias in params.logit_bias.values():
        if not -100 <= bias <= 100:
            raise RequestError(f"logit_bias has {bias!r}; allowed: -100 to 100", param="logit_bias")


def _several(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]
