"""What is done to the server, each as one function that returns what it saw. Nothing here judges."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bench.load.client import Answer, ask, completion, request_bytes
from bench.load.server import Server

PATH = "/v1/completions"
MIB = 1 << 20
FLAT = 4.0  # MiB a minute: a leak of 100 bytes a token, or of 4 KiB a request, would be more
WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school"]


def percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, share)) if values else float("nan")


# Many connections.


@dataclasses.dataclass
class Burst:
    """The answers, in the order of their start."""

    answers: list[Answer]

    @property
    def statuses(self) -> dict[int, int]:
        return dict(Counter(answer.status for answer in self.answers))

    @property
    def refusals(self) -> list[float]:
        """Seconds from connecting to the end of each 429."""
        return [answer.seconds for answer in self.answers if answer.status == 429]

    @property
    def admitted_first(self) -> int:
        """Requests that were begun before the first refusal came, and answered."""
        first = min((answer.ended for answer in self.answers if answer.status == 429), default=float("inf"))
        return sum(answer.status == 200 and answer.started < first for answer in self.answers)


async def burst(server: Server, connections: int = 1000, seconds: float = 5.0, tokens: int = 16) -> Burst:
    """Connections opened evenly over `seconds`, each asking for a completion."""
    start = time.monotonic()

    async def one(i: int) -> Answer:
        await asyncio.sleep(start + i * seconds / connections - time.monotonic())
        return await ask(server.port, "POST", PATH, completion(f"Count on from {i}:", tokens))

    return Burst(list(await asyncio.gather(*map(one, range(connections)))))


async def cancelled(server: Server, count: int = 200, tokens: int = 400) -> Answer:
    """So many long requests that all hang up at once, and a short one right after them: its answer."""
    tasks = [
        asyncio.create_task(ask(server.port, "POST", PATH, completion(f"Tell a story about {i}.", tokens, stream=True)))
        for i in range(count)
    ]
    deadline = time.monotonic() + 30
    while (await server.load()).get("server_load", 0) < count and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return await ask(server.port, "POST", PATH, completion("The capital of France is", 8))


# Two minutes of everything.


@dataclasses.dataclass
class Soak:
    """statuses: of all answers (0: none, the client left). memory: (second, Server.memory), without those of the
    warm-up. after: what GET /load says at the end. answer: to a short request after all."""

    statuses: dict[int, int]
    memory: list[tuple[float, dict[str, int]]]
    after: dict[str, Any]
    answer: Answer

    def slope(self, process: str) -> float:
        """Bytes a minute, by a straight line."""
        samples = self.memory
        times, values = [second for second, _ in samples], [float(memory[process]) for _, memory in samples]
        return float(np.polyfit(times, values, 1)[0]) * 60 if len(samples) > 2 else float("nan")


BAD: list[tuple[str, str, Any]] = [
    ("POST", PATH, b"{"),
    ("POST", PATH, b"\xff\xfe"),
    ("POST", PATH, {}),
    ("POST", PATH, {"prompt": "x", "max_tokens": -1}),
    ("POST", PATH, {"prompt": "x", "temperature": "hot"}),
    ("POST", PATH, {"prompt": "x", "model": "no-such-model"}),
    ("POST", PATH, {"prompt": [10**9]}),
    ("POST", PATH, {"prompt": "word " * 20000}),
    ("POST", PATH, {"prompt": "x", "n": 10**6}),
    ("POST", PATH, b"[" * 20000),
    ("POST", "/v1/chat/completions", {"messages": "x"}),
    ("POST", "/no/such/route", {}),
    ("DELETE", PATH, None),
]


async def soak(server: Server, seconds: float = 120.0, clients: int = 24, seed: int = 0, warm_up: float = 30.0) -> Soak:
    """Random load: answers of all lengths, clients that leave at any moment, bad requests, broken connections.

    What a process keeps for the shapes it has seen, it has after `warm_up` seconds more of the same load, before.
    """
    draw = random.Random(seed)
    statuses: Counter[int] = Counter()
    memory: list[tuple[float, dict[str, int]]] = []
    start = time.monotonic()

    async def client() -> None:
        while time.monotonic() - start < seconds:
            kind = draw.random()
            if kind < 0.2:
                answer = await ask(server.port, *draw.choice(BAD))
            elif kind < 0.3:
                await _broken(server.port, draw)
                continue
            else:
                body = completion(_words(draw, draw.choice([1, 10, 100, 300])), draw.choice([1, 5, 20, 60]))
                body |= {"stream": draw.random() < 0.7, "n": draw.choice([1, 1, 1, 2])}
                body |= {"temperature": draw.choice([0, 1]), "stop": draw.choice([None, [" the"]])}
                leave = draw.choice([None, None, 0, 1, 3]) if body["stream"] else draw.choice([None, None, 0])
                answer = await ask(server.port, "POST", PATH, body, leave)
            statuses[answer.status] += 1

    async def watch() -> None:
        await asyncio.sleep(warm_up)
        while time.monotonic() - start < seconds:
            memory.append((time.monotonic() - start, server.memory()))
            await asyncio.sleep(1.0)

    await server.calm()  # what it makes when it is first idle, it has
    await _fill(server, draw)
    start = time.monotonic() + warm_up
    await asyncio.gather(watch(), *(client() for _ in range(clients)))
    after = await server.wait_idle()
    answer = await ask(server.port, "POST", PATH, completion("The capital of France is", 8))
    return Soak(dict(statuses), memory, after, answer)


async def _fill(server: Server, draw: random.Random) -> None:
    """Writes every block of the KV cache once, and sends a prompt of every length as the engine rounds it up, and as
    many answers at a time: the system gives memory page by page, and oneDNN keeps its code for each number of rows,
    which are no leaks."""
    load = await server.load()
    tokens = load["kv_blocks_total"] * 64
    for _ in range(tokens // 200 + 1):
        await ask(server.port, "POST", PATH, completion(_words(draw, 200), 1))
    for rows in (*range(1, 9), *range(16, 513, 8)):
        await ask(server.port, "POST", PATH, {"prompt": [1000 + rows] * rows, "max_tokens": 1})
    for answers in range(2, 9):
        await ask(server.port, "POST", PATH, completion("Once", 2, n=answers))


async def _broken(port: int, draw: random.Random) -> None:
    """A request that breaks off somewhere."""
    data = request_bytes("POST", PATH, json.dumps(completion("Once upon a time", 50)).encode())
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data[: draw.randrange(len(data))])
        await asyncio.sleep(draw.choice([0.0, 0.1, 1.0]))
        writer.transport.abort()


def _words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


# What one client does to another.


async def streams(server: Server, count: int, tokens: int) -> list[Answer]:
    """So many streams at once, each of so many tokens."""
    bodies = [completion(f"Write a long story about the number {i}.", tokens, stream=True) for i in range(count)]
    return list(await asyncio.gather(*(ask(server.port, "POST", PATH, body) for body in bodies)))


@dataclasses.dataclass
class Beside:
    """Seconds between the tokens of one stream, alone and beside the disturbance, turn by turn. statuses, seconds: of
    what disturbed; 0: it was not answered before the stream's end."""

    quiet: list[list[float]] = dataclasses.field(default_factory=list)
    loud: list[list[float]] = dataclasses.field(default_factory=list)
    statuses: dict[int, int] = dataclasses.field(default_factory=dict)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def ratios(self, share: float = 99) -> list[float]:
        """Of each turn: this percentile beside the disturbance to that right before, alone."""
        turns = zip(self.quiet, self.loud, strict=True)
        return [percentile(loud, share) / percentile(quiet, share) for quiet, loud in turns]


async def beside(
    server: Server, clients: Sequence[Sequence[tuple[str, str, Any]]], tokens: int = 200, rounds: int = 5
) -> Beside:
    """One stream, alone and beside `clients`, taking turns. Each client sends its requests one after another without a
    pause, from one round to the next."""
    seen, statuses = Beside(), Counter[int]()
    endless = [itertools.cycle(requests) for requests in clients]

    async def disturb(requests: Iterator[tuple[str, str, Any]]) -> None:
        for request in requests:
            answer = await ask(server.port, *request)
            statuses[answer.status] += 1
            seen.seconds.append(answer.seconds)

    for _ in range(rounds):
        for gaps, disturbing in ((seen.quiet, False), (seen.loud, True)):
            await server.calm()
            tasks = [asyncio.create_task(disturb(requests)) for requests in endless if disturbing]
            await asyncio.sleep(0.2)  # it has begun
            (answer,) = await streams(server, 1, tokens)
            gaps.append(answer.gaps)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    seen.statuses = dict(statuses)
    return seen


async def health_under_load(server: Server, count: int, tokens: int, every: float = 0.02) -> list[float]:
    """Seconds of each GET /health, on a connection of its own, while so many streams run."""
    load = asyncio.create_task(streams(server, count, tokens))
    taken: list[float] = []
    while not load.done():
        taken.append((await ask(server.port, "GET", "/health")).seconds)
        await asyncio.sleep(every)
    await load
    return taken


async def idle(server: Server, seconds: float = 10.0) -> float:
    """Share of one core that the server's processes use when nobody asks anything."""
    await server.wait_idle()
    await asyncio.sleep(2.0)
    before, start = server.cpu_seconds(), time.monotonic()
    await asyncio.sleep(seconds)
    return (server.cpu_seconds() - before) / (time.monotonic() - start)


async def hang(server: Server) -> tuple[float, float]:
    """The engine process is stopped (SIGSTOP) under a stream. Seconds until /health answers 503, and until a new engine
    is ready."""
    stream = asyncio.create_task(streams(server, 1, 400))
    while (await server.load()).get("running", 0) == 0:
        await asyncio.sleep(0.01)
    os.kill(server.engine_pid(), signal.SIGSTOP)
    stopped = time.monotonic()
    while (await ask(server.port, "GET", "/health")).status == 200:
        await asyncio.sleep(0.01)
    noticed = time.monotonic()
    await stream
    return noticed - stopped, await server.wait_ready() - stopped
