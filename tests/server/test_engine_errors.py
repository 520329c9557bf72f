"""What a client is told when the engine fails on a request: faults that a healthy engine cannot be asked for."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from engine.checkpoint import Tokenizer
from engine.errors import EngineDeadError, RequestError
from engine.messages import Output
from tests.server.live import events
from tests.server.scripted import ScriptedEngine, ask


def complete(engine: ScriptedEngine, tokenizer: Tokenizer, **fields: Any) -> httpx.Response:
    return ask(engine, tokenizer, "POST", "/v1/completions", json={"prompt": "hi", **fields})


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
        early = complete(ScriptedEngine(fault), tokenizer, stream=stream)
        assert early.status_code == status and early.json()["error"]["type"] == kind
        assert said in early.json()["error"]["message"] and "secret" not in early.text
        assert early.headers["x-request-id"]
    late = complete(ScriptedEngine(TOKEN, fault), tokenizer, stream=True)
    first, error = events(iter([late.text]))
    assert first["choices"][0]["text"] == "The" and error["error"]["type"] == kind
    assert complete(ScriptedEngine(TOKEN, fault), tokenizer).status_code == status


def test_one_failed_choice_fails_the_reply_once(tokenizer: Tokenizer) -> None:
    late = complete(ScriptedEngine(TOKEN, FAILED), tokenizer, stream=True, n=3)
    assert sum("error" in event for event in events(iter([late.text]))) == 1


def test_a_silent_engine_is_not_healthy(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(TOKEN)
    engine.silence = "the engine has not been heard from for 11 s"
    error = complete(engine, tokenizer).json()["error"]
    assert error["code"] == "unresponsive" and "11 s" in error["message"]


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__ }}", "{{ 1 + '' }}", "{{ raise_exception('no') }}"])
def test_a_chat_template_that_fails(tokenizer: Tokenizer, template: str) -> None:
    response = ask(
        ScriptedEngine(TOKEN),
        tokenizer,
        "POST",
        "/v1/chat/completions",
        template=template,
        json={"messages": [{"role": "user", "content": ""}]},
    )
    assert response.status_code in (400, 500) and "template" in response.json()["error"]["message"]
