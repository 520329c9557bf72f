"""One run of load: requests arrive, at most so many at once, and every token's time is noted."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from bench.serving.client import Client, HttpError, events
from bench.serving.datasets import Conversation, Turn
from bench.serving.options import ServeOptions

LAG_SECONDS = 0.05  # how often the client's own lateness is looked at


@dataclasses.dataclass
class Answer:
    """Of one request; times in seconds of time.perf_counter. ttft: to the first piece. itl: between pieces. latency: to
    the last piece. queue_time: that the client itself held it back. error: "" for success."""

    prompt_len: int
    start: float = 0.0
    ttft: float = 0.0
    itl: list[float] = dataclasses.field(default_factory=list)
    latency: float = 0.0
    queue_time: float = 0.0
    output_tokens: int = 0
    cached_tokens: int = 0
    text: str = ""
    error: str = ""


@dataclasses.dataclass
class Run:
    """seconds: from the first request to the last answer. lag: seconds that the client's event loop was late, sampled.
    cpu: share of one core that the client took. cancelled: requests not answered when the run was cut short."""

    answers: list[Answer]
    seconds: float
    lag: list[float]
    cpu: float
    cancelled: int = 0


class Load:
    """Sends requests to one server as `options` say."""

    def __init__(self, client: Client, options: ServeOptions, model: str):
        self.client, self.options, self.model = client, options, model

    async def run(
        self,
        conversations: Sequence[Conversation],
        concurrency: int | None,
        seed: int,
        stop: asyncio.Event,
        done: Callable[[Answer], None] = lambda answer: None,
    ) -> Run:
        """Until everything is answered or `stop` is set; `done` gets each answer."""
        answers: list[Answer] = []
        gate = asyncio.Semaphore(concurrency) if concurrency else contextlib.nullcontext()

        async def talk(conversation: Conversation, arrival: float) -> None:
            messages: list[dict[str, str]] = []
            for turn in conversation:
                messages.append({"role": "user", "content": turn.text})
                async with gate:
                    answer = await self.ask(turn, messages)
                answer.queue_time = answer.start - arrival
                answers.append(answer)
                done(answer)
                if answer.error:
                    return  # what follows would build on an answer that is not there
                messages.append({"role": "assistant", "content": answer.text})
                arrival = time.perf_counter()

        lag: list[float] = []
        watch = asyncio.create_task(_watch(lag))
        tasks: list[asyncio.Task[None]] = []
        halt = asyncio.create_task(stop.wait())
        cpu, started = time.process_time(), time.perf_counter()
        async for conversation in self._arrivals(conversations, seed, halt):
            tasks.append(asyncio.create_task(talk(conversation, time.perf_counter())))
        whole = asyncio.gather(*tasks)
        await asyncio.wait([whole, halt], return_when=asyncio.FIRST_COMPLETED)
        seconds = time.perf_counter() - started
        cpu = (time.process_time() - cpu) / seconds
        for task in (watch, halt, *tasks):
            task.cancel()
        await asyncio.gather(whole, watch, halt, *tasks, return_exceptions=True)
        asked = sum(len(conversation) for conversation in conversations)
        return Run(answers, seconds, lag, cpu, asked - len(answers) if stop.is_set() else 0)

    async def warm_up(self, turn: Turn, count: int, concurrency: int | None) -> None:
        """`count` requests of the same kind, whose answers do not count."""
        gate = asyncio.Semaphore(concurrency or count or 1)

        async def one() -> None:
            async with gate:
                await self.ask(turn, [{"role": "user", "content": turn.text}])

        await asyncio.gather(*(one() for _ in range(count)))

    async def ask(self, turn: Turn, messages: list[dict[str, str]]) -> Answer:
        """One request. What fails is in the answer's `error`."""
        options, text = self.options, ""
        body: dict[str, Any] = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        if options.chat:
            body |= {"messages": messages, "max_completion_tokens": turn.new_tokens}
        else:
            body |= {"prompt": "".join(m["content"] for m in messages), "max_tokens": turn.new_tokens}
        data = msgspec.json.encode(body | options.body)
        answer = Answer(turn.tokens, start=time.perf_counter())
        last = 0.0
        try:
            async with self.client.open("POST", options.path, data) as chunks:
                async for event in events(chunks):
                    if event == b"[DONE]":
                        continue
                    now = time.perf_counter()
                    piece = msgspec.json.decode(event)
                    if error := piece.get("error"):
                        raise HttpError(200, f"the server ended the answer: {error.get('message', error)}")
                    choices = piece.get("choices")
                    if choices and not (options.chat and _opening(choices[0])):
                        if last:
                            answer.itl.append(now - last)
                        else:
                            answer.ttft = now - answer.start
                        last = now
                        choice = choices[0]
                        text += (choice["delta"].get("content") if options.chat else choice.get("text")) or ""
                    if usage := piece.get("usage"):
                        answer.output_tokens = usage.get("completion_tokens") or 0
                        answer.prompt_len = usage.get("prompt_tokens") or answer.prompt_len
                        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        except HttpError as error:
            answer.error = str(error)
        except (msgspec.DecodeError, AttributeError, KeyError, TypeError) as error:
            answer.error = f"the server's events are not those of the OpenAI API ({type(error).__name__})"
        if not last and not answer.error:
            answer.error = "the answer had no piece of text"
        answer.latency, answer.text = max(last - answer.start, 0.0), text
        return answer

    async def _arrivals(
        self, conversations: Sequence[Conversation], seed: int, halt: asyncio.Task[Any]
    ) -> AsyncIterator[Conversation]:
        started = time.perf_counter()
        for conversation, due in zip(conversations, arrival_times(self.options, len(conversations), seed), strict=True):
            if (wait := started + due - time.perf_counter()) > 0:
                await asyncio.wait([halt], timeout=wait)
            if halt.done():
                return
            yield conversation


def arrival_times(options: ServeOptions, count: int, seed: int) -> list[float]:
    """Seconds after the start at which each request arrives: a Poisson process at --request-rate, or with a
    --burstiness other than 1 intervals of a gamma distribution (below 1: in bursts). Scaled so that `count` requests
    take count / rate seconds, as vLLM does, except where the rate grows (--ramp-up-strategy)."""
    rate, shape = options.request_rate, options.burstiness
    if options.ramp_up_strategy is not None:
        low, high = options.ramp_up_start_rps or 0.0, options.ramp_up_end_rps or 0.0
        steps = [i / max(count - 1, 1) for i in range(count)]
        linear = options.ramp_up_strategy == "linear"
        rates = [low + (high - low) * x if linear else low * (high / low) ** x for x in steps]
    else:
        rates = [rate] * count
    if math.isinf(rates[-1]):
        return [0.0] * count
    generator = np.random.default_rng(seed)
    means = 1 / np.array(rates)
    gaps = means if math.isinf(shape) else generator.gamma(shape, means / shape)
    times = np.cumsum(gaps)
    if options.ramp_up_strategy is None and times[-1] > 0:
        times *= count / rate / times[-1]
    return [float(value) for value in times]


def _opening(choice: dict[str, Any]) -> bool:
    """A chat's first chunk names the role and carries no token."""
    return not choice["delta"].get("content") and "role" in choice["delta"] and not choice.get("finish_reason")


async def _watch(lag: list[float]) -> None:
    while True:
        due = time.perf_counter() + LAG_SECONDS
        await asyncio.sleep(LAG_SECONDS)
        lag.append(max(time.perf_counter() - due, 0.0))
