"""What a request may cost: its head, its body, its depth, its time, its place in the queue."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import Tokenizer
from engine.errors import RequestError
from engine.messages import Output, Request
from server.json_route import MAX_DEPTH, deeper
from server.long_texts import LongTexts
from server.service import LONG_TEXT
from tests.server.live import LiveServer, events, settings
from tests.server.scripted import ScriptedEngine, ask


@pytest.fixture(scope="module")
def tight(smollm2: Path) -> Iterator[LiveServer]:
    """One runs at a time, for two seconds at most; 100 tokens may wait; a body may rest for half a second."""
    prelude = "import server.middleware; server.middleware.BODY_SECONDS = 0.5\n"
    limits = {"max_queue_tokens": 100, "request_timeout": 2.0, "served_model_name": ["smollm2", "other/name"]}
    live = LiveServer(settings(str(smollm2), {"max_num_seqs": 1, "max_model_len": 4096}, **limits), prelude=prelude)
    yield live
    live.wait_idle()
    assert live.stop() == 0


LONG = {"prompt": "Count to a thousand:", "max_tokens": 4000, "ignore_eos": True, "temperature": 0}


def test_a_request_ends_when_its_time_is_over(tight: LiveServer) -> None:
    began = time.monotonic()
    whole = tight.http.post("/v1/completions", json=LONG)
    error = whole.json()["error"]
    assert whole.status_code == 504 and error["code"] == "request_timeout" and error["type"] == "timeout_error"
    assert "2 s" in error["message"] and 1.9 < time.monotonic() - began < 10
    with tight.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
        *chunks, last = events(response.iter_text())
    assert len(chunks) > 1 and last["error"]["code"] == "request_timeout"
    tight.wait_idle(5)
    assert tight.complete(max_tokens=2).json()["choices"][0]["text"] == " Paris."


def test_the_queue_is_bounded_in_tokens(tight: LiveServer) -> None:
    def ask_for(words: int) -> Any:
        reply = tight.complete("a" + " b" * (words - 1), max_tokens=1)
        return reply.status_code, reply.json()

    with ThreadPoolExecutor(4) as pool:
        running = pool.submit(tight.http.post, "/v1/completions", json=LONG)
        while tight.load()["running"] < 1:
            time.sleep(0.01)
        first = pool.submit(ask_for, 60)
        while tight.load()["waiting"] < 1:
            time.sleep(0.01)
        status, reply = ask_for(60)
        assert status == 429 and reply["error"]["code"] == "queue_full" and "60" in reply["error"]["message"]
        small = pool.submit(ask_for, 20)
        assert running.result().status_code == 504
        assert {first.result()[0], small.result()[0]} <= {200, 504}
    assert ask_for(300)[0] == 200  # nothing waits: more than fits the queue


def test_both_names_are_served(tight: LiveServer) -> None:
    assert [card["id"] for card in tight.http.get("/v1/models").json()["data"]] == ["smollm2", "other/name"]
    assert tight.http.get("/v1/models/other/name").json()["id"] == "other/name"
    assert tight.complete(max_tokens=1, model="other/name").json()["model"] == "other/name"
    stream = tight.stream("/v1/completions", prompt="a", model="other/name")
    assert {event["model"] for event in stream} == {"other/name"}
    assert tight.complete(max_tokens=1).json()["model"] == "smollm2"
    refused = tight.complete(max_tokens=1, model="third").json()["error"]
    assert refused["code"] == "model_not_found" and "'smollm2' and 'other/name'" in refused["message"]


def exchange(server: LiveServer, *pieces: bytes, pause: float = 0.0) -> bytes:
    """Send bytes over a bare socket, resting in between, and read until the server is done."""
    with socket.create_connection(("127.0.0.1", server.settings.port), timeout=10) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        answer = b""
        while data := connection.recv(65536):
            answer += data
            if b"\r\n\r\n" in answer and b"}}" in answer:
                break
    return answer


def head(*headers: str, method: str = "POST /v1/completions") -> bytes:
    return "\r\n".join([f"{method} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


JSON_BODY = ("Content-Type: application/json", "Content-Length: 1000")


def test_a_body_that_stops_coming(tight: LiveServer) -> None:
    answer = exchange(tight, head(*JSON_BODY), b'{"prompt"')
    assert answer.startswith(b"HTTP/1.1 408 ") and b"timeout_error" in answer and b"0.5 s" in answer
    body = json.dumps({"prompt": "The capital of France is", "max_tokens": 2, "temperature": 0}).encode()
    slow = [body[i : i + 20] for i in range(0, len(body), 20)]  # slow, but it comes
    answer = exchange(tight, head("Content-Type: application/json", f"Content-Length: {len(body)}"), *slow, pause=0.3)
    assert b" Paris." in answer


def test_large_heads(server: LiveServer) -> None:
    many = exchange(server, head(*(f"X-H{i}: 1" for i in range(101)), method="GET /health"))
    assert many.startswith(b"HTTP/1.1 431 ") and b"102 headers" in many
    assert exchange(server, head("X-Big: " + "x" * 40_000, method="GET /health")).startswith(b"HTTP/1.1 431 ")
    assert server.http.get("/health", headers={"X-Fine": "x" * 8000}).status_code == 200


@pytest.mark.parametrize(
    "pieces",
    [(b"HELLO\r\n\r\n",), (b"GET /health HTTP/1.1\r\n\r\n",), (head()[:-2], b"X-Big: " + b"x" * 70_000)],
    ids=["no HTTP", "no Host", "endless"],
)
def test_what_is_no_http(server: LiveServer, pieces: tuple[bytes, ...]) -> None:
    answer, _, body = exchange(server, *pieces, pause=0.1).partition(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ") and b"application/json" in answer and b"connection: close" in answer
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error" and "32 KiB" in error["message"]


def test_depth(server: LiveServer) -> None:
    def nested(depth: int) -> Any:
        value: Any = 1
        for _ in range(depth - 1):
            value = [value, {"a": 1}]
        return server.complete(max_tokens=1, metadata=value)

    assert nested(MAX_DEPTH).status_code == 400 and nested(MAX_DEPTH - 2).status_code == 200
    assert "nested too deeply" in nested(MAX_DEPTH).json()["error"]["message"]
    assert not deeper([[1], {"a": [2]}], 3) and deeper([[1], {"a": [2]}], 2) and not deeper(5, 0)


def test_text_that_cannot_fit_is_refused_by_its_size(server: LiveServer) -> None:
    text = "x" * 2**20
    for reply in (server.complete(text), server.chat(text), server.http.post("/tokenize", json={"messages": []})):
        assert reply.status_code == 400
    for reply in (server.complete(text), server.chat(text)):
        error = reply.json()["error"]
        assert error["code"] == "context_length_exceeded" and "512" in error["message"] and "1048" in error["message"]


def test_long_texts_are_tokenised_with_patience(smollm2: Path, tokenizer: Tokenizer) -> None:
    """In a process that gives way to everybody, with the same result, also of marked text."""
    texts = LongTexts(tokenizer, str(smollm2), "auto")
    try:
        text = "The quick brown fox. " * LONG_TEXT
        assert texts.encode(text, True) == tokenizer.encode(text)
        marked = f"<|im_start|>{tokenizer.mark_text('not <|im_end|> the end')}<|im_end|>"
        ids = tokenizer.encode_marked(marked)
        assert texts.encode(marked, False, marked=True) == ids and ids.count(2) == 1
        child = texts._child
        assert child is not None
        if sys.platform == "linux":
            assert os.sched_getscheduler(child.pid) == os.SCHED_IDLE
        with pytest.raises(RequestError, match="surrogate"):
            texts.encode("\ud800", True)
        child.kill()  # the next request gets a new one
        assert texts.encode("hi", False) == tokenizer.encode("hi", False)
    finally:
        texts.close()


def test_tokenising_leaves_the_interpreter_free(tokenizer: Tokenizer) -> None:
    async def turns(text: str) -> tuple[int, int]:
        count, done = 0, asyncio.get_running_loop().run_in_executor(None, tokenizer.encode, text)
        while not done.done():
            count += 1
            await asyncio.sleep(0.001)
        return count, len(await done)

    count, tokens = asyncio.run(turns("The quick brown fox. " * (LONG_TEXT // 2)))
    assert tokens > LONG_TEXT and count > 20  # with the interpreter locked it would be one or two


class Remembering(ScriptedEngine):
    """Keeps the requests it got."""

    def __init__(self) -> None:
        super().__init__(Output(id="x", tokens=[504], finish_reason="stop"))
        self.requests: list[Request] = []

    async def generate(self, request: Request) -> Any:
        self.requests.append(request)
        async for output in super().generate(request):
            yield output


def test_the_salt_reaches_the_engine(tokenizer: Tokenizer) -> None:
    engine = Remembering()
    for fields in ({}, {"cache_salt": "pepper"}):
        ask(engine, tokenizer, "POST", "/v1/completions", json={"prompt": "hi", **fields})
    for key in ("key-a-12345", "key-b-12345"):
        headers = {"Authorization": f"Bearer {key}"}
        ask(engine, tokenizer, "POST", "/v1/completions", json={"prompt": "hi"}, headers=headers, keys=[key])
    salts = [request.cache_salt for request in engine.requests]
    assert salts[:2] == ["", "pepper"] and len(set(salts)) == 4 and not any("key" in salt for salt in salts)


def test_a_browser_is_told_what_a_page_may_do(server: LiveServer) -> None:
    page = server.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';") and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert page.headers["referrer-policy"] == "no-referrer" and page.headers["x-frame-options"] == "DENY"
    for path in ("/", "/page/style.css", "/health", "/nothing"):
        assert server.http.get(path).headers["x-content-type-options"] == "nosniff"
    assert "content-security-policy" not in server.http.get("/health").headers
    assert server.http.get("/docs").headers["content-security-policy"] == policy
