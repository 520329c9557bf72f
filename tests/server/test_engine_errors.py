"""What a client is told when the engine fails on a request: faults that a healthy engine cannot be asked for, hence a
scripted one behind the real application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.checkpoint import Tokenizer, open_checkpoint
from engine.errors import EngineDeadError, RequestError
from engine.messages import EngineInfo, EngineStats, Output, Request
from server.app import create_app
from server.settings import ServerSettings
from tests.server.live import events

INFO = EngineInfo(
    model="m", path="", architecture="llama", parameters=1, quantization="", dtype="", device="", vocab_size=49152,
    max_model_len=64, block_size=64, num_blocks=1, kv_cache_bytes=1, weight_bytes=1, load_seconds=0,
    batch_invariant=True,
)  # fmt: skip


class ScriptedEngine:
    """Gives every request the same outputs, or raises what it finds among them."""

    def __init__(self, *script: Output | Exception):
        self.script = script
        self.info, self.stats, self.state, self.silence = INFO, EngineStats(), "ready", ""

    async def start(self) -> None: ...
    async def stop(self) -> None: ...

    def health(self) -> tuple[bool, str]:
        return not self.silence, self.silence

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        for item in self.script:
            if isinstance(item, Exception):
                raise item
            yield item


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return open_checkpoint(str(smollm2)).tokenizer


def post(engine: Any, tokenizer: Tokenizer, path: str = "/v1/completions", template: str = "x", **body: Any) -> Any:
    app = create_app(engine, tokenizer, ServerSettings(), chat_template=template, model="m")
    body = {"prompt": "hi", **body} if path == "/v1/completions" else {"messages": [{"role": "user", "content": ""}]}

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json=body)

    return asyncio.run(ask())


TOKEN = Output(id="x", tokens=[504])
FAILED = Output(id="x", finish_reason="error", error="the step gave NaN for this request")


@pytest.mark.parametrize(
    ("fault", "status", "kind", "said"),
    [
        (FAILED, 500, "internal_server_error", "NaN"),
        (EngineDeadError("the engine process was killed"), 503, "service_unavailable_error", "killed"),
        (RequestError("too long", "prompt", "context_length_exceeded"), 400, "invalid_request_error", "too long"),
        (ZeroDivisionError("secret"), 500, "internal_server_error", "log"),
    ],
)
def test_a_fault_has_its_status_before_the_first_token_and_is_an_event_after_it(
    tokenizer: Tokenizer, fault: Any, status: int, kind: str, said: str
) -> None:
    for stream in (False, True):
        early = post(ScriptedEngine(fault), tokenizer, stream=stream)
        assert early.status_code == status and early.json()["error"]["type"] == kind
        assert said in early.json()["error"]["message"] and "secret" not in early.text
        assert early.headers["x-request-id"]
    late = post(ScriptedEngine(TOKEN, fault), tokenizer, stream=True)
    first, error = events(iter([late.text]))
    assert first["choices"][0]["text"] == "The" and error["error"]["type"] == kind
    assert post(ScriptedEngine(TOKEN, fault), tokenizer).status_code == status


def test_one_failed_choice_fails_the_reply_once(tokenizer: Tokenizer) -> None:
    late = post(ScriptedEngine(TOKEN, FAILED), tokenizer, stream=True, n=3)
    assert sum("error" in event for event in events(iter([late.text]))) == 1


def test_a_silent_engine_is_not_healthy(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(TOKEN)
    engine.silence = "the engine has not been heard from for 11 s"
    error = post(engine, tokenizer).json()["error"]
    assert error["code"] == "unresponsive" and "11 s" in error["message"]


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__ }}", "{{ 1 + '' }}", "{{ raise_exception('no') }}"])
def test_a_chat_template_that_fails(tokenizer: Tokenizer, template: str) -> None:
    response = post(ScriptedEngine(TOKEN), tokenizer, "/v1/chat/completions", template)
    assert response.status_code in (400, 500) and "template" in response.json()["error"]["message"]
