"""The life of a generation request after validation: admit, tokenise, run its choices, answer as JSON or as events."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.detokenizer import TextDelta
from engine.messages import EngineInfo
from server.choice import Choice
from server.cost import reply_cost
from server.errors import ApiError, as_api_error
from server.logs import REPLY
from server.protocol import GenerationBody, StreamOptions
from server.service import Service
from server.settings import KEEP_ALIVE_SECONDS

T = TypeVar("T")
LAST_EVENT_SECONDS = 5.0
Json = dict[str, Any]
encode_json = msgspec.json.encode


class Shape(Protocol):
    """How an endpoint words its replies."""

    kind: str  # "object" of a whole reply
    chunk_kind: str  # "object" of a chunk
    prefix: str  # of ids

    def opening(self, choice: Choice) -> Json | None:
        """The choice's first chunk, before any token."""

    def chunk(self, choice: Choice, delta: TextDelta) -> Json | None:
        """What `delta` adds; None: nothing to send."""

    def whole(self, choice: Choice, deltas: list[TextDelta]) -> Json: ...


class Generation(Response):
    """A response that does the work when it is sent, so that admission, cancellation and errors have one scope.

    Nothing is sent before the first output (or the first keep-alive): what fails before still gets its own status.
    """

    def __init__(self, service: Service, asked: GenerationBody, shape: Shape, prompts: int):
        self.service = service
        self.asked = asked
        self.shape = shape
        self.prompts = prompts
        self.made: list[Choice] = []
        self.arrival = time.monotonic()
        self.id = shape.prefix + (asked.request_id or uuid.uuid4().hex)
        self.created = int(time.time())
        self.stream = asked.stream
        self.options = asked.stream_options or StreamOptions()
        self.status_code = 200
        self.background = None
        self.media_type = "text/event-stream" if self.stream else "application/json"
        headers = asked.ignored_header()
        if self.stream:
            headers |= {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.send, self.begun = send, False
        self.cache_salt = self.service.keys.cache_salt(scope, self.asked.cache_salt or "")
        self.info = self.service.check_ready()
        with self.service.admit(self.prompts * self.asked.n):
            work = self.run_stream() if self.stream else self.run_whole()
            try:
                await until_disconnect(receive, work, self.keep_alive if self.stream else None)
            finally:
                scope[REPLY] = self.service.recent.add(self)

    @contextlib.asynccontextmanager
    async def time_limit(self) -> AsyncIterator[None]:
        """Raises ApiError 504 when --request-timeout has passed since the arrival."""
        limit = self.service.settings.request_timeout
        try:
            async with asyncio.timeout(None if limit is None else limit - (time.monotonic() - self.arrival)):
                yield
        except TimeoutError:
            if limit is None:
                raise
            message = f"the request was not finished within the {limit:g} s that this server gives one"
            raise ApiError(504, message, code="request_timeout") from None

    # Choices

    async def choices(self) -> list[Choice]:
        service, asked, info = self.service, self.asked, self.info
        choices = self.made
        prompts = await service.encode(asked)
        service.admit_tokens(prompts, asked.n)
        constraints = await service.constraints(asked)
        for prompt in prompts:
            max_tokens = service.max_tokens(asked, len(prompt), info)
            for i in range(asked.n):
                params = asked.sampling(max_tokens, i, info.vocab_size)
                params = msgspec.structs.replace(params, **constraints)
                choices.append(Choice(service, prompt, params, len(choices), self.arrival))
        service.metrics.observe_request(asked.n, choices)
        return choices

    async def run_choices(self, choices: list[Choice], each: Callable[[Choice, TextDelta], Awaitable[None]]) -> None:
        """Run all choices. Of n, the first goes ahead until its prompt is in the prefix cache for the others."""
        asked = self.asked
        ahead: dict[int, asyncio.Event] = {}

        async def run(choice: Choice) -> None:
            group, place = divmod(choice.index, asked.n)
            if place and (event := ahead.get(group)) is not None:
                await event.wait()
            async for delta in choice.deltas(asked.priority, self.cache_salt):
                if (event := ahead.get(group)) is not None:
                    event.set()
                await each(choice, delta)

        if len(choices) == 1:
            await run(choices[0])
            return
        if asked.n > 1 and shares_blocks(choices, self.info):
            ahead = {group: asyncio.Event() for group in range(len(choices) // asked.n)}
        try:
            async with asyncio.TaskGroup() as tasks:
                for choice in choices:
                    tasks.create_task(run(choice))
        except* Exception as group:
            raise first_error(group) from None

    # Replies

    async def run_whole(self) -> None:
        deltas: list[list[TextDelta]] = []

        async def keep(choice: Choice, delta: TextDelta) -> None:
            deltas[choice.index].append(delta)

        async with self.time_limit():
            choices = await self.choices()
            deltas += [[] for _ in choices]
            await self.run_choices(choices, keep)
        data = encode_json(self.whole(choices, deltas))
        self.raw_headers.append((b"content-length", str(len(data)).encode()))
        await self.begin()
        await self.send({"type": "http.response.body", "body": data})

    def whole(self, choices: list[Choice], deltas: list[list[TextDelta]]) -> Json:
        reply = self.head(self.shape.kind)
        reply["choices"] = [self.shape.whole(choice, deltas[choice.index]) for choice in choices]
        reply["usage"] = self.usage(choices) | self.cost(choices)
        reply["metrics"] = self.timing(choices)
        return reply

    async def run_stream(self) -> None:
        try:
            async with self.time_limit():
                choices = await self.choices()
                await self.run_choices(choices, self.send_delta)
            if self.options.include_usage:
                last = self.head(self.shape.chunk_kind)
                last |= {"choices": [], "usage": self.usage(choices) | self.cost(choices)}
                last["metrics"] = self.timing(choices)
                await self.write(b"data: " + encode_json(last) + b"\n\n")
        except Exception as error:
            if not self.begun:
                raise
            async with asyncio.timeout(LAST_EVENT_SECONDS):  # the client may be one that reads no more
                await self.write(b"data: " + encode_json(as_api_error(error).body()) + b"\n\n")
        await self.write(b"data: [DONE]\n\n")
        await self.send({"type": "http.response.body", "body": b""})

    async def send_delta(self, choice: Choice, delta: TextDelta) -> None:
        chunks = []
        if not choice.opened:
            choice.opened = True
            chunks.append(self.shape.opening(choice))
        chunks.append(self.shape.chunk(choice, delta))
        data = b""
        for chunk in chunks:
            if chunk is not None:
                event = self.head(self.shape.chunk_kind)
                event["choices"] = [chunk]
                if self.options.continuous_usage_stats:
                    event["usage"] = self.usage([choice]) | {"cost": None, "cost_details": None}
                elif self.options.include_usage:
                    event["usage"] = None
                data += b"data: " + encode_json(event) + b"\n\n"
        if data:
            await self.write(data)

    def head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.asked.model or self.service.model}

    def usage(self, choices: list[Choice]) -> Json:
        """Every prompt counts once, however many choices it has."""
        firsts = choices[:: self.asked.n] if len(choices) > 1 else choices
        prompt = sum(len(choice.prompt) for choice in firsts)
        completion = sum(choice.completion_tokens for choice in choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in firsts)},
        }

    def cost(self, choices: list[Choice]) -> Json:
        return reply_cost((choice.device_seconds for choice in choices), *self.service.price())

    def timing(self, choices: list[Choice]) -> Json | None:
        """Under vLLM's names. Of several choices: the first token of any, the end of the last."""
        begun = [choice for choice in choices if choice.started is not None]
        if not begun:
            return None
        first = min(choice.started or 0.0 for choice in begun)
        end = max(choice.ended for choice in begun)
        tokens = sum(choice.completion_tokens for choice in begun)
        gaps = sum(choice.completion_tokens - 1 for choice in begun)
        decoding = sum(choice.ended - (choice.started or 0.0) for choice in begun)
        return {
            "time_to_first_token_ms": round((first - self.arrival) * 1e3, 3),
            "queue_time_ms": round(min(choice.queue_seconds for choice in begun) * 1e3, 3),
            "mean_itl_ms": round(decoding / gaps * 1e3, 3) if gaps > 0 else None,
            "tokens_per_second": round(tokens / max(end - self.arrival, 1e-9), 3),
        }

    # Sending

    async def begin(self) -> None:
        self.begun = True
        await self.send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

    async def write(self, data: bytes) -> None:
        if not self.begun:
            await self.begin()
        await self.send({"type": "http.response.body", "body": data, "more_body": True})

    async def keep_alive(self) -> None:
        await self.write(b": keep-alive\n\n")


def shares_blocks(choices: list[Choice], info: EngineInfo) -> bool:
    return max(len(choice.prompt) for choice in choices) > info.block_size


def first_error(group: BaseExceptionGroup[Exception]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def until_disconnect(
    receive: Receive, work: Coroutine[Any, Any, T], tick: Callable[[], Awaitable[None]] | None = None
) -> T | None:
    """Run `work`, cancelling it when the client leaves (-> None); call `tick` every KEEP_ALIVE_SECONDS meanwhile."""
    task = asyncio.create_task(work)

    async def watch() -> None:
        while True:
            try:
                async with asyncio.timeout(KEEP_ALIVE_SECONDS if tick else None):
                    message = await receive()
            except TimeoutError:
                assert tick is not None
                await tick()
                continue
            if message["type"] == "http.disconnect":
                return

    watcher = asyncio.create_task(watch())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for unfinished in (task, watcher):
            unfinished.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
