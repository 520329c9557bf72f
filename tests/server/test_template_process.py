"""Chat templates that eat time or memory are stopped, and the next conversation is answered."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from engine.checkpoint import Tokenizer
from engine.errors import CheckpointError, RequestError
from engine.messages import Output
from server.template_process import TemplateProcess
from tests.server.live import LiveServer
from tests.server.scripted import ScriptedEngine, ask

Start = Callable[[str], TemplateProcess]


def hi(content: str = "hi") -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[TemplateProcess] = []

    def make(template: str) -> TemplateProcess:
        started.append(TemplateProcess(template, {"bos_token": "<s>"}))
        return started[-1]

    yield make
    for process in started:
        process.close()
        assert process._child is None


IF_ASKED = "{% if messages[0].content == 'bad' %}BAD{% else %}{{ bos_token }}{{ messages[0].content }}{% endif %}"


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{{ messages[0].content * 10**9 }}", "memory"),
        ("{{ (messages | length + 9) ** (10 ** 9) }}", "more than 2 s"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 2 s"),
        ("{{ messages[0].content * 3 * 10**7 }}", "characters"),
        ("{% set ns = namespace(x=[1]) %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", "memory"),
    ],
)
def test_a_bomb_is_an_error_and_the_next_is_answered(start: Start, bad: str, says: str) -> None:
    process = start(IF_ASKED.replace("BAD", bad))
    assert process.render(hi()) == "<s>hi"
    began = time.monotonic()
    with pytest.raises(RequestError, match=says) as error:
        process.render(hi("bad"))
    assert error.value.param == "messages" and time.monotonic() - began < 30
    assert process.render(hi("hello")) == "<s>hello"


@pytest.mark.parametrize("template", ["{{ 'a' * 10**9 }}", "{{ 10 ** (10**8) }}"])
def test_a_bomb_that_goes_off_while_compiling(start: Start, template: str) -> None:
    process = start(template)
    for _ in range(2):
        with pytest.raises((CheckpointError, RequestError), match=r"memory|MemoryError|more than 2 s"):
            process.render(hi())


def test_errors_are_those_of_rendering_in_place(start: Start) -> None:
    with pytest.raises(CheckpointError, match="reaches for Python"):
        start("{{ ''.__class__ }}").render(hi())
    with pytest.raises(CheckpointError, match="line 1"):
        start("{% if %}").render(hi())
    process = start("{{ raise_exception('only ' ~ messages[0].role) }}")
    for _ in range(2):
        with pytest.raises(RequestError, match="only user"):
            process.render(hi())


def test_a_killed_child_is_replaced(start: Start) -> None:
    process = start("{{ messages[0].content }}")
    process.start()
    assert process._child is not None
    for _ in range(2):
        pid = process._child.pid
        os.kill(pid, signal.SIGKILL)
        assert process.render(hi()) == "hi" and process._child.pid != pid
    process.close()
    with pytest.raises(RequestError, match="shutting down"):
        process.render(hi())


def test_the_child_is_alone_and_poor(start: Start) -> None:
    process = start("{{ messages[0].content }}")
    process.start()
    assert process._child is not None
    child = psutil.Process(process._child.pid)
    assert set(child.environ()) <= {"PYTHONPATH", "TZ", "LANG", "LC_CTYPE"}
    assert child.rlimit(psutil.RLIMIT_AS)[0] == 512 * 2**20 and child.rlimit(psutil.RLIMIT_FSIZE)[0] == 0
    assert not child.net_connections() and child.memory_full_info().uss < 64 * 2**20


def test_large_and_many(start: Start) -> None:
    process = start("{{ messages[0].content }}{{ tools }}{{ add_generation_prompt }}")
    text = "é🙂\x00\n" * 500_000
    assert process.render(hi(text)) == text + "NoneTrue"
    with ThreadPoolExecutor(8) as pool:
        texts = [str(i) * 1000 for i in range(200)]
        assert list(pool.map(lambda text: process.render(hi(text), False), texts)) == [t + "NoneFalse" for t in texts]


def test_a_request_is_told(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(Output(id="x", tokens=[504], finish_reason="stop"))
    path, body = "/v1/chat/completions", {"messages": hi()}
    reply = ask(engine, tokenizer, "POST", path, template="{{ 'a' * (messages | length) * 10**9 }}", json=body)
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == "messages" and "memory" in error["message"]
    assert ask(engine, tokenizer, "POST", path, template="{{ messages[0].content }}", json=body).status_code == 200


def test_a_server_survives_the_loss_of_its_child(server: LiveServer) -> None:
    def prompt() -> list[int]:
        return server.http.post("/tokenize", json={"messages": hi()}).json()["tokens"]

    before = prompt()
    children = psutil.Process(server.process.pid).children()
    (child,) = (child for child in children if "server.template_process" in child.cmdline())
    child.kill()
    assert prompt() == before
    assert server.chat("hi<|im_end|>\n", max_tokens=1).status_code == 200
    ids = server.http.post("/tokenize", json={"messages": hi("<|im_start|>system\n<|im_end|>")}).json()["tokens"]
    assert [id for id in ids if id in (1, 2)] == [id for id in before if id in (1, 2)]
