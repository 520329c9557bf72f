"""One completion in flight: engine outputs in, final text with its tokens out."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from engine.detokenizer import OutputText, TextDelta
from engine.errors import FenError
from engine.messages import Output, Request, SamplingParams, TokenLogprob
from server.errors import ApiError

if TYPE_CHECKING:
    from server.service import Service


class Choice:
    """Choice `index` of a reply. `arrival`, `started` (first token) and `ended` (last) are time.monotonic() seconds."""

    def __init__(self, service: Service, prompt: list[int], params: SamplingParams, index: int, arrival: float):
        self.service = service
        self.prompt = prompt
        self.params = params
        self.index = index
        self.arrival = arrival
        self.id = uuid.uuid4().hex
        self.started: float | None = None
        self.ended = arrival
        self.cached_tokens = 0
        self.queue_seconds = 0.0
        self.device_seconds: dict[str, float] | None = None  # by class of the ledger, once it has finished
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.opened = False  # its first chunk was sent
        self._text = OutputText(service.tokenizer, params)

    @property
    def completion_tokens(self) -> int:
        return self._text.num_tokens

    async def deltas(self, priority: int = 0, cache_salt: str = "") -> AsyncGenerator[TextDelta, None]:
        """Runs the request; the last delta has a finish_reason. Leaving the iterator cancels the request.

        Raises RequestError, EngineDeadError, or ApiError 500 when the engine failed on this request.
        """
        request = Request(
            id=self.id,
            prompt=self.prompt,
            params=self.params,
            priority=priority,
            cache_salt=cache_salt,
            arrival=self.arrival,
        )
        self.service.choices.add(self)
        try:
            async with contextlib.aclosing(self.service.client.generate(request)) as outputs:
                async for output in outputs:
                    self._clock(output)
                    self.device_seconds = output.device_seconds
                    delta = self._text.add(output)
                    self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
                    if delta.finish_reason == "error":
                        raise ApiError(500, output.error or "the engine failed on this request")
                    if delta.cancel:
                        self.service.client.finish(self.id, self.completion_tokens, output.device_seconds or {})
                    yield delta
                    if delta.finish_reason is not None:
                        return
        except FenError:
            self.finish_reason = "error"
            raise
        finally:
            self.service.choices.discard(self)
            self.service.metrics.observe(self)

    async def abort(self) -> None:
        """End it from outside; `deltas` ends with finish_reason "abort"."""
        await self.service.client.cancel(self.id)

    def _clock(self, output: Output) -> None:
        now = time.monotonic()
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if not output.tokens and self.params.max_tokens:
            return
        if self.started is None:
            self.started = now
            self.cached_tokens = output.cached_tokens
            self.queue_seconds = output.queue_seconds
            if output.tokens:
                self.service.metrics.first_token.observe(now - self.arrival)
        elif output.tokens:
            self.service.metrics.inter_token.observe((now - self.ended) / len(output.tokens))
        self.ended = now
