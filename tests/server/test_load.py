"""Many clients at once, clients that leave, a full queue: nobody else suffers and every block comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.live import LiveServer, settings

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "omicron",
    "pi",
    "rho",
    "sigma",
    "tau",
]


async def read_stream(client: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None) -> str | None:
    """The streamed text; None for one that was left after some events."""
    text, seen = "", 0
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return text
            if line.startswith("data: "):
                text += json.loads(line[6:])["choices"][0]["text"]
                seen += 1
            if seen == leave_after:
                return None
    raise AssertionError("the stream broke off")


def test_32_mixed_streams_some_cancelled(exact: LiveServer) -> None:
    dice = random.Random(5)
    bodies = []
    for i in range(32):
        prompt = " ".join(dice.choices(WORDS, k=dice.choice([1, 5, 20, 60]))) + f" {i}"
        bodies.append({"prompt": prompt, "max_tokens": dice.randint(4, 14), "temperature": 0, "ignore_eos": True})
    leaves = [dice.randint(1, 3) if i % 4 == 3 else None for i in range(32)]

    async def run() -> list[str | None]:
        async with httpx.AsyncClient(base_url=exact.url, timeout=120) as client:
            tasks = (read_stream(client, body, leave) for body, leave in zip(bodies, leaves, strict=True))
            return await asyncio.gather(*tasks)

    together = asyncio.run(run())
    exact.wait_idle(60)
    assert [text is None for text in together] == [leave is not None for leave in leaves]
    for i in (0, 10, 21):  # a sample; the engine's own tests compare all
        assert exact.http.post("/v1/completions", json=bodies[i]).json()["choices"][0]["text"] == together[i]


def leave(server: LiveServer, body: dict[str, Any]) -> None:
    """Post `body` over a bare socket, wait until it runs, and hang up."""
    data = json.dumps({"prompt": "Count to a thousand:", "max_tokens": 480, "ignore_eos": True, **body}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.settings.port)) as connection:
        connection.sendall(head.encode() + data)
        deadline = time.monotonic() + 10
        while server.load()["kv_blocks_used"] == 0:
            assert time.monotonic() < deadline, "the request never ran"
            time.sleep(0.01)


def test_a_client_that_leaves_frees_its_blocks(server: LiveServer) -> None:
    aborted = 'vllm:request_success_total{finished_reason="abort",model_name="smollm2"}'

    def aborts() -> float:
        lines = server.http.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(aborted)).rsplit(" ", 1)[1])

    for body in ({"stream": True}, {"stream": False}, {"stream": True, "n": 3}, {"stream": False, "n": 3}):
        server.wait_idle()
        before = aborts()
        leave(server, body)
        server.wait_idle(5)  # most of 480 tokens were to come
        assert aborts() == before + body.get("n", 1)


def test_slow_readers_and_half_open_sockets_hold_their_own_place_only(server: LiveServer) -> None:
    """Who does not read keeps no block; who does not finish its request has no place either."""
    body = {"prompt": "Once upon a time", "max_tokens": 40, "ignore_eos": True, "stream": True, "logprobs": 5}
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    data = json.dumps(body).encode()
    whole = head + f"Content-Length: {len(data)}\r\n\r\n".encode() + data
    with contextlib.ExitStack() as open_sockets:
        for sent in [whole] * 4 + [head, whole[:-20], b"POST /v1/comp", b""] * 5:
            connection = open_sockets.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(("127.0.0.1", server.settings.port))
            connection.sendall(sent)
        deadline = time.monotonic() + 30
        while server.load()["server_load"] < 1:
            assert time.monotonic() < deadline, "the slow readers' requests never ran"
        assert server.load()["server_load"] <= 4
        assert server.complete(max_tokens=2).json()["choices"][0]["text"] == " Paris."
        while (load := server.load())["kv_blocks_used"] or load["running"]:
            assert time.monotonic() < deadline, "a reader that does not read holds blocks"
            time.sleep(0.02)
    server.wait_idle()


@pytest.fixture(scope="module")
def narrow(smollm2: Path) -> Iterator[LiveServer]:
    """Two run, two wait; silent streams are told that the server lives after 0.1 s instead of 15."""
    prelude = "import server.generation; server.generation.KEEP_ALIVE_SECONDS = 0.1"
    live = LiveServer(settings(str(smollm2), {"max_num_seqs": 2}, max_queue=2), prelude=prelude)
    yield live
    assert live.stop() == 0


def test_a_full_queue_answers_429(narrow: LiveServer) -> None:
    """Those that do not fit are turned away at once; those admitted are all answered."""

    def ask(i: int) -> httpx.Response:
        return narrow.complete(f"Count on from {i}:", max_tokens=40, ignore_eos=True)

    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(ask, range(12)))
    codes = sorted(response.status_code for response in responses)
    assert codes == [200] * 4 + [429] * 8
    for response in responses:
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["type"] == "rate_limit_error"
        else:
            assert response.json()["usage"]["completion_tokens"] == 40
    assert narrow.metric("fen:requests_refused_total") == 8
    too_many = narrow.complete(n=5, max_tokens=1)
    assert too_many.status_code == 400 and too_many.json()["error"]["param"] == "n"
    assert narrow.complete(n=4, max_tokens=2, temperature=1).status_code == 200
    narrow.wait_idle()


def test_keep_alive_comments_on_a_silent_stream(narrow: LiveServer) -> None:
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(narrow.complete, "Count:", n=2, max_tokens=40, ignore_eos=True)
        while narrow.load()["running"] < 2:
            time.sleep(0.01)
        body = {"prompt": "hi", "max_tokens": 2, "stream": True}
        with narrow.http.stream("POST", "/v1/completions", json=body) as response:
            text = "".join(response.iter_text())
        assert busy.result().status_code == 200
    assert text.startswith(": keep-alive\n\n") and text.endswith("data: [DONE]\n\n")
