"""An engine of one's own for the terminal: what `fen chat` and `fen run` talk to. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Generator, Mapping
from typing import Any, TypeVar

import msgspec

from bench.prices import USE, Price, price_of, usd
from engine.chat import encode_chat
from engine.checkpoint import open_checkpoint
from engine.core.client import EngineClient
from engine.detokenizer import OutputText
from engine.errors import FenError, RequestError
from engine.messages import EngineInfo, EngineOptions, Request, SamplingParams

T = TypeVar("T")
Messages = list[dict[str, str]]
REST_OF_CONTEXT = 2**31 - 1  # as SamplingParams.max_tokens: whatever the context leaves


@dataclasses.dataclass
class Usage:
    """Of the latest answer. Seconds: from the question to the first piece of text, and from there to the last."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0
    finish_reason: str | None = None  # None: interrupted
    device_seconds: float | None = None  # that the answer itself took
    usd_per_hour: float | None = None  # of the device

    def charge(self, device_seconds: Mapping[str, float] | None) -> None:
        """Takes what the answer was charged with, by class of the ledger."""
        if device_seconds is not None:
            self.device_seconds = sum(device_seconds[name] for name in USE)

    def cost(self) -> str:
        if self.device_seconds is None:
            return ""
        if self.usd_per_hour is None:
            return f"{self.device_seconds:.2f} device-seconds"
        return f"{usd(self.device_seconds * self.usd_per_hour / 3600)} at US${self.usd_per_hour:g} a device-hour"

    def line(self) -> str:
        """The line under an answer. The first token belongs to the prompt's time, so the rate counts those after it."""
        rate = (self.completion_tokens - 1) / self.seconds if self.completion_tokens > 1 and self.seconds > 0 else None
        parts = [
            f"{self.completion_tokens} tokens"
            if self.completion_tokens
            else "",  # unknown of a server's stopped answer
            f"{rate:.1f} tokens/s" if rate else "",
            f"first after {self.first_seconds:.2f} s",
            f"prompt of {self.prompt_tokens}, {self.cached_tokens} from the cache" if self.prompt_tokens else "",
            self.cost(),
            {"length": "cut off: the limit of tokens is reached", None: "stopped"}.get(self.finish_reason, ""),
        ]
        return " · ".join(part for part in parts if part)


class LocalModel:
    """One engine process, driven from a synchronous program: the event loop runs in a thread of its own.

    Raises CheckpointError or CapacityError (by way of EngineDeadError) when the model cannot be served.
    """

    def __init__(
        self,
        options: EngineOptions,
        on_loading: Callable[[str, float], None] | None = None,
        price: Price | None = None,
    ):
        checkpoint = open_checkpoint(options.model, options.load_format)
        self.tokenizer, self.template = checkpoint.tokenizer, checkpoint.chat_template
        self.usage = Usage()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine client", daemon=True)
        self._thread.start()
        self._client = EngineClient(options)
        try:
            self.info: EngineInfo = self._run(self._client.start(on_loading))
            price = price or price_of(self.info.device)
            self._usd_per_hour = price and price.usd_per_device_hour
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the engine process."""
        self._run(self._client.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> LocalModel:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def chat(self, messages: Messages, params: SamplingParams) -> Generator[str, None, None]:
        """The pieces of the answer to `messages`, by the checkpoint's chat template. See `complete`."""
        yield from self._answer(encode_chat(self.template, messages, self.tokenizer), params)

    def complete(self, prompt: str, params: SamplingParams) -> Generator[str, None, None]:
        """The pieces of the text that follows `prompt`; afterwards `usage` tells about it. Leaving early stops it.

        params.max_tokens is cut to what the context leaves. Raises RequestError, EngineDeadError, FenError.
        """
        yield from self._answer(self.tokenizer.encode(prompt), params)

    def _answer(self, ids: list[int], params: SamplingParams) -> Generator[str, None, None]:
        room = self.info.max_model_len - len(ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and the context {self.info.max_model_len}: "
                "shorten it, or raise --max-model-len"
            )
        params = msgspec.structs.replace(params, max_tokens=min(params.max_tokens, room))
        self.usage = Usage(prompt_tokens=len(ids), usd_per_hour=self._usd_per_hour)
        pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        future = asyncio.run_coroutine_threadsafe(self._generate(ids, params, self.usage, pieces.put), self._loop)
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            future.cancel()

    async def _generate(
        self, ids: list[int], params: SamplingParams, usage: Usage, put: Callable[[str | BaseException | None], None]
    ) -> None:
        start = time.monotonic()
        request = Request(id=uuid.uuid4().hex, prompt=ids, params=params, arrival=start)
        text = OutputText(self.tokenizer, params)
        try:
            async with contextlib.aclosing(self._client.generate(request)) as outputs:
                async for output in outputs:
                    now = time.monotonic()
                    if output.tokens and not usage.completion_tokens:
                        usage.first_seconds, usage.cached_tokens = now - start, output.cached_tokens
                    delta = text.add(output)
                    usage.completion_tokens = text.num_tokens
                    usage.seconds = now - start - usage.first_seconds
                    if output.error:
                        raise FenError(output.error)
                    if delta.text:
                        put(delta.text)
                    if delta.finish_reason is not None:
                        usage.charge(output.device_seconds)
                        if delta.cancel:
                            self._client.finish(request.id, text.num_tokens, output.device_seconds or {})
                        usage.finish_reason = delta.finish_reason
                        break
            put(None)
        except Exception as error:
            put(error)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
