"""API keys: where they come from, what they guard, and that two keys share nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.checkpoint import Tokenizer
from engine.errors import FenError
from engine.messages import Output
from server.app import api
from server.keys import ApiKeys, read_keys
from tests.server.live import LiveServer, settings
from tests.server.scripted import ScriptedEngine, ask
from tests.server.test_bad_requests import check_error
from tests.server.test_cli import fen_process, one_sentence

ADA, BOB = "sk-ada-0123456789", "sk-bob-0123456789"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def guarded(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Ada's key in a file, Bob's in the environment; blocks of 16 tokens, so that short prompts are cached."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# one a line\n\n{ADA}\n")
    file.chmod(0o600)
    prelude = f"import os; os.environ['FEN_API_KEYS'] = '{BOB},'\n"
    live = LiveServer(settings(str(smollm2), {"block_size": 16}, api_key_file=str(file)), prelude=prelude)
    yield live
    assert live.stop() == 0
    assert ADA not in live.printed() and BOB not in live.printed()


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/completions", {"prompt": "hi"}),
        ("POST", "/v1/chat/completions", {"messages": []}),
        ("POST", "/tokenize", {"prompt": "hi"}),
        ("GET", "/v1/models", None),
        ("GET", "/metrics", None),
        ("GET", "/load", None),
        ("GET", "/v1/cost", None),
        ("GET", "/openapi.json", None),
        ("GET", "/docs", None),
        ("GET", "/nothing", None),
        ("POST", "/health", None),
    ],
)
def test_every_route_but_the_public_ones_wants_a_key(guarded: LiveServer, method: str, path: str, body: Any) -> None:
    wrong = [{}, bearer("sk-eve-0123456789"), bearer("x"), bearer(ADA[:-1]), {"Authorization": f"Basic {ADA}"}]
    for headers in [*wrong, {"X-Api-Key": "nonsense"}, {"Cookie": ADA}]:
        refused = httpx.request(method, guarded.url + path, json=body, headers=headers)
        error = refused.json()["error"]
        assert refused.status_code == 401 and error["type"] == "authentication_error", headers
        assert error["code"] == "invalid_api_key" and "Bearer" in error["message"] and "eve" not in error["message"]
        assert refused.headers["www-authenticate"] == "Bearer" and refused.headers["x-request-id"]
    for headers in (bearer(ADA), {"Authorization": f"bearer {BOB}"}, {"X-Api-Key": ADA}):
        assert httpx.request(method, guarded.url + path, json=body, headers=headers).status_code != 401


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_want_none(guarded: LiveServer, path: str) -> None:
    assert httpx.get(guarded.url + path).status_code == 200
    assert httpx.head(guarded.url + path).status_code == 200


def test_keys_share_no_cached_block(guarded: LiveServer) -> None:
    def cached(key: str, **fields: Any) -> int:
        body = {"prompt": "one two three four five " * 8, "max_tokens": 1, **fields}
        reply = httpx.post(guarded.url + "/v1/completions", json=body, headers=bearer(key)).json()
        return reply["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(ADA) == 0 and cached(ADA) >= 16
    assert cached(BOB) == 0 and cached(BOB) >= 16
    assert cached(ADA, cache_salt="a") == 0 and cached(ADA, cache_salt="a") >= 16
    assert cached(BOB, cache_salt="a") == 0 and cached(ADA) >= 16


def test_the_children_do_not_see_the_keys(guarded: LiveServer) -> None:
    environment = Path(f"/proc/{guarded.engine_pid()}/environ").read_bytes()
    assert b"PATH=" in environment and BOB.encode() not in environment


def test_the_line_to_try_brings_a_key_and_shows_none(guarded: LiveServer) -> None:
    printed = guarded.printed()
    assert 'chat/completions -H "Authorization: Bearer $FEN_API_KEY"' in printed
    assert ADA not in printed and BOB not in printed


def test_the_terminal_sends_the_key_of_its_environment(guarded: LiveServer) -> None:
    result = fen_process("cost", "--url", guarded.url, FEN_API_KEY=ADA)
    assert result.returncode == 0, result.stderr
    refused = fen_process("cost", "--url", guarded.url)
    assert refused.returncode == 1 and "401" in one_sentence(refused.stderr)


def test_the_description_says_that_a_key_is_wanted(guarded: LiveServer) -> None:
    spec = guarded.http.get("/openapi.json", headers=bearer(ADA)).json()
    assert {name for way in spec["security"] for name in way} == spec["components"]["securitySchemes"].keys()
    public = {path for path, operations in spec["paths"].items() if operations.get("get", {}).get("security") == []}
    assert public == {path for path in spec["paths"] if httpx.get(guarded.url + path).status_code == 200}
    assert "security" not in api().openapi()


def test_a_salt_belongs_to_key_and_server() -> None:
    keys = ApiKeys([ADA, BOB])
    salts = {keys.cache_salt({"fen.key": place}, asked) for place in (1, 2) for asked in ("", "a", "b")}
    assert len(salts) == 6
    assert ApiKeys([ADA]).cache_salt({"fen.key": 1}, "") not in salts
    assert keys.cache_salt({}, "a") == "a"  # without keys


def test_a_browser_may_ask_before_it_has_a_key(tokenizer: Tokenizer) -> None:
    headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    engine = ScriptedEngine(Output(id="x", tokens=[504], finish_reason="stop"))
    ask_with = {"cors": "https://a.example", "keys": [ADA]}
    allowed = ask(engine, tokenizer, "OPTIONS", "/v1/completions", headers=headers, **ask_with)
    assert allowed.status_code == 200
    refused = ask(
        engine, tokenizer, "POST", "/v1/completions", headers={"Origin": "https://a.example"}, json={}, **ask_with
    )
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://a.example"


# Which names a server answers to


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/v1/nothing", "/openapi.json"])
def test_a_page_that_rebinds_its_name_is_turned_away(server: LiveServer, path: str) -> None:
    error = check_error(server.http.get(path, headers={"Host": "rebind.example:8000"}), 421, None)
    assert error["code"] == "unknown_host" and "rebind.example" in error["message"]
    assert "--allowed-hosts" in error["message"]


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("127.0.0.1", 200), ("127.0.0.1:8000", 200), ("10.1.2.3:80", 200), ("[::1]:8000", 200), ("[fe80::1]", 200),
        ("localhost", 200), ("LOCALHOST.:8000", 200), ("fen.localhost", 200),
        ("host.docker.internal:8000", 200), ("internal.example", 421),
        ("", 421), ("localhost.example", 421), ("127.0.0.1.example", 421), ("nolocalhost", 421),
        ("localhost@a.example", 421), ("[a.example]", 421), ("127.0.0.1:80:80", 421), ("127.1", 421), ("a" * 3000, 421),
        ("\x7f", 421),
    ],
)  # fmt: skip
def test_addresses_and_localhost_pass(server: LiveServer, name: str, status: int) -> None:
    response = server.http.get("/health", headers=[("Host", name)])
    assert response.status_code == status, response.text
    assert len(response.content) < 1024


def test_other_names_have_to_be_allowed(tokenizer: Tokenizer) -> None:
    def status(name: str, **how: Any) -> int:
        return ask(ScriptedEngine(), tokenizer, "GET", "/v1/models", headers={"Host": name}, **how).status_code

    assert status("a.example", loopback=True) == 421 and status("a.example", loopback=True, keys=[ADA]) == 401
    assert status("a.example") == 200  # on a network there are names that nobody told us of
    hosts = ["A.example.", "b.example"]
    assert [status(f"{name}.example:80", hosts=hosts, loopback=True) for name in "abc"] == [200, 200, 421]
    assert [status(f"{name}.example:80", hosts=hosts) for name in "abc"] == [200, 200, 421]
    assert status("c.example", hosts=hosts, keys=[ADA]) == 421
    assert status("c.example", hosts=["*"], loopback=True) == 200


@pytest.mark.parametrize("name", ["http://a.example", "a.example:80", "*.a.example", "a b", ".", ""])
def test_a_name_that_no_host_can_have(tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises(FenError, match="--allowed-hosts"):
        ask(ScriptedEngine(), tokenizer, "GET", "/health", hosts=[name])


# Where keys come from


def test_keys_of_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# Ada\n  {ADA}  \n\n{BOB}\n")
    environment = {"FEN_API_KEYS": " sk-c-0123456789 ,sk-d-0123456789", "FEN_API_KEY": BOB, "OTHER": "x"}
    assert read_keys(str(file), environment) == [ADA, BOB, "sk-c-0123456789", "sk-d-0123456789"]
    assert environment == {"OTHER": "x"}
    assert read_keys(None, {}) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no key"),
        ("# only a comment\n\n", "holds no key"),
        ("short\n", "at least 8"),
        ("with a space\n", "without spaces"),
        ("schlüssel-123\n", "ASCII"),
        (b"\xff\xfe\x00", "text file"),
        (None, "cannot be read"),
    ],
)
def test_a_key_file_that_cannot_be_used(tmp_path: Path, content: str | bytes | None, says: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(FenError, match=says) as error:
        read_keys(str(file), {})
    assert str(file) in str(error.value) and "with a space" not in str(error.value)


@pytest.mark.parametrize("variable", ["FEN_API_KEYS", "FEN_API_KEY"])
def test_a_variable_that_cannot_be_used(variable: str) -> None:
    for value in ("", " ", "abc"):
        with pytest.raises(FenError, match=variable):
            read_keys(None, {variable: value})


def test_a_key_file_that_all_may_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text(ADA)
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        read_keys(str(file), {})
    assert "chmod 600" in caplog.text and ADA not in caplog.text
    file.chmod(0o600)
    caplog.clear()
    read_keys(str(file), {})
    assert not caplog.text


def test_serve_refuses_to_start_without_the_keys_it_was_told_of(tmp_path: Path) -> None:
    result = fen_process("serve", "--port", "0", "--api-key-file", str(tmp_path / "none"))
    assert result.returncode == 1 and "cannot be read" in one_sentence(result.stderr)
