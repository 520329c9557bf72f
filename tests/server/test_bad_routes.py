"""Bad input to every route: bodies that are no usable JSON, content types, methods, and the routes for tokens."""

from __future__ import annotations

import gzip
import json
import re
from typing import Any

import pytest

from tests.server.conform import PATHS
from tests.server.live import LiveServer
from tests.server.test_bad_requests import HI, check_error

BODY_ROUTES = [path for path, operations in PATHS.items() if "post" in operations]
JSON = {"Content-Type": "application/json"}
UNKNOWN = pytest.param("/tokenize", {"prompt": "a", "model": "gpt-4"}, 404, "model", id="tokenize another model")


def case(path: str, param: str | None, **body: Any) -> Any:
    return pytest.param(path, body, 400, param, id=f"{path} {json.dumps(body)[:60]}")


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        case("/tokenize", "prompt"),
        case("/tokenize", "prompt", prompt="a", messages=HI),
        case("/tokenize", "prompt", prompt=5),
        case("/tokenize", "prompt", prompt=["a"]),
        case("/tokenize", "messages", messages=[]),
        case("/tokenize", "messages", messages="hi"),
        case("/tokenize", "messages[0]", messages=[5]),
        case("/tokenize", "messages[0].role", messages=[{"role": "robot", "content": "hi"}]),
        case("/tokenize", "messages[0].content", messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        case("/tokenize", "tools", messages=HI, tools="f"),
        case("/tokenize", "tools", prompt="a", tools=[{"type": "function", "function": {"name": "f"}}]),
        case("/tokenize", "add_special_tokens", prompt="a", add_special_tokens=1),
        case("/tokenize", "add_generation_prompt", messages=HI, add_generation_prompt="no"),
        case("/tokenize", "return_token_strs", prompt="a", return_token_strs=0),
        case("/tokenize", "model", prompt="a", model=["smollm2"]),
        case("/tokenize", "chat_template", messages=HI, chat_template="x"),
        case("/tokenize", "continue_final_message", messages=HI, continue_final_message=True),
        UNKNOWN,
        case("/detokenize", "tokens"),
        case("/detokenize", "tokens", tokens=None),
        case("/detokenize", "tokens", tokens="a"),
        case("/detokenize", "tokens", tokens=5),
        case("/detokenize", "tokens[1]", tokens=[1, -1]),
        case("/detokenize", "tokens[0]", tokens=[1.5]),
        case("/detokenize", "tokens[0]", tokens=["1"]),
        case("/detokenize", "tokens[0]", tokens=[True]),
        case("/detokenize", "tokens[0]", tokens=[10**30]),
        case("/detokenize", "tokens", tokens=[49152]),
        pytest.param("/detokenize", {"tokens": [0] * (2**20 + 1)}, 400, "tokens", id="detokenize too many"),
        pytest.param("/detokenize", {"tokens": [1], "model": "gpt-4"}, 404, "model", id="detokenize another model"),
        pytest.param("/v1/responses", {"input": "a", "model": "gpt-4"}, 404, "model", id="responses another model"),
        pytest.param("/v1/embeddings", {"input": "a"}, 404, None, id="embeddings"),
        pytest.param("/embeddings", {}, 404, None, id="embeddings without /v1"),
    ],
)
def test_refused(server: LiveServer, path: str, body: Any, status: int, param: str | None) -> None:
    check_error(server.http.post(path, json=body), status, param)


@pytest.mark.parametrize("path", BODY_ROUTES)
@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "empty"),
        (b"{", "not JSON"),
        (b"hello", "not JSON"),
        (b"[1]", "JSON object"),
        (b"null", "JSON object|empty"),
        (b'"text"', "JSON object"),
        (b'{"a": 1} {"a": 1}', "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 01}', "not JSON"),
        (b'{"model": "\xff"}', "UTF-8"),
        ("{}".encode("utf-16"), "UTF-8"),
        (b'{"model": "\\ud800"}', "not JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
    ],
    ids=lambda value: repr(value[:30]) if isinstance(value, bytes) else "",
)
def test_a_body_that_is_no_usable_json(server: LiveServer, path: str, body: bytes, said: str) -> None:
    error = check_error(server.http.post(path, content=body, headers=JSON), 400, None)
    assert re.search(said, error["message"]), error


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", b'{"prompt": "hi", "temperature": NaN}', "temperature"),
        ("/v1/completions", b'{"prompt": "hi", "top_p": Infinity}', "top_p"),
        ("/v1/completions", b'{"prompt": "hi", "logit_bias": {"5": -Infinity}}', "logit_bias"),
        ("/v1/completions", b'{"prompt": "hi", "temperature": 1e999}', "temperature"),
        ("/v1/chat/completions", b'{"messages": [], "min_p": NaN}', "min_p"),
        ("/v1/responses", b'{"input": "hi", "top_p": -Infinity}', "top_p"),
        ("/detokenize", b'{"tokens": [NaN]}', "tokens"),
    ],
)
def test_what_is_no_number_in_json(server: LiveServer, path: str, body: bytes, param: str) -> None:
    check_error(server.http.post(path, content=body, headers=JSON), 400, param)


@pytest.mark.parametrize("path", BODY_ROUTES)
@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "é", "x" * 3000, None])
def test_content_type(server: LiveServer, path: str, content_type: str | None) -> None:
    headers = {"Content-Type": content_type.encode()} if content_type else {}
    error = check_error(server.http.post(path, content=b'{"prompt": "hi"}', headers=headers), 415, None)
    assert "application/json" in error["message"]


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "APPLICATION/JSON"])
def test_content_types_of_json(server: LiveServer, content_type: str) -> None:
    headers = {"Content-Type": content_type}
    assert server.http.post("/tokenize", content=b'{"prompt": "hi"}', headers=headers).status_code == 200


def test_a_byte_order_mark_is_passed_over(server: LiveServer) -> None:
    body = b'\xef\xbb\xbf{"prompt": "hi"}'
    assert server.http.post("/tokenize", content=body, headers=JSON).json()["count"] == 1


def test_a_compressed_body_is_refused(server: LiveServer) -> None:
    headers = JSON | {"Content-Encoding": "gzip"}
    error = check_error(server.http.post("/tokenize", content=gzip.compress(b"{}"), headers=headers), 415, None)
    assert "Content-Encoding 'gzip'" in error["message"]


def test_no_route_speaks_another_protocol(server: LiveServer) -> None:
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    assert server.http.get("/health", headers=headers | {"Sec-WebSocket-Key": "eA=="}).json() == {"status": "ok"}


@pytest.mark.parametrize("path", [path.replace("{model}", "smollm2") for path in PATHS])
def test_wrong_methods(server: LiveServer, path: str) -> None:
    allowed = "POST" if path in BODY_ROUTES else "GET"
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - {allowed}:
        if (method, allowed) == ("HEAD", "GET"):
            continue
        response = server.http.request(method, path)
        assert response.status_code == 405 and response.headers["allow"] == allowed
        if method != "HEAD":
            check_error(response, 405, None)


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/models/gpt-4", "model"),
        ("/v1/models/org/other", "model"),
        ("/models/%FF%00", "model"),
        ("/v1/models/" + "x" * 3000, "model"),
        ("/v1/models/", "model"),
        ("/v1/nothing", None),
        ("/v1", None),
        ("/v1/completions/", None),
        ("/v1/../etc/passwd", None),
        ("/v1/embeddings", None),
        ("/%00", None),
    ],
)
def test_not_found(server: LiveServer, path: str, param: str | None) -> None:
    error = check_error(server.http.get(path), 404, param)
    assert error["type"] == "not_found_error"
    assert server.http.head(path).status_code == 404


def test_of_a_field_given_twice_the_last_counts(server: LiveServer) -> None:
    body = b'{"tokens": "x", "tokens": [504]}'
    assert server.http.post("/detokenize", content=body, headers=JSON).json() == {"prompt": "The"}


def test_still_answers_after_all_that(server: LiveServer) -> None:
    assert server.complete(max_tokens=2).json()["choices"][0]["text"] == " Paris."
    server.wait_idle()
