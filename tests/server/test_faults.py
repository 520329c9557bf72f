"""Faults in a real engine, one at a time: who suffers, who does not, what is said, and the text that comes after."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.server import faulty_engine as fault
from tests.server.live import LiveServer, settings
from tests.server.test_lifecycle import Reader

PROMPTS = ["The capital of France is", "Count to twenty: one, two,", "Once upon a time, there was a"]
LONG_PROMPT = "All of these words are a part of the prompt. " * 30  # more than one chunk of 256 tokens
TOKENS = 12


@pytest.fixture(scope="module")
def live(smollm2: Path) -> Iterator[LiveServer]:
    """In float32, where a text is the same whatever else is in the batch."""
    options = {"dtype": "float32", "max_num_batched_tokens": 256, "max_num_seqs": 8}
    server = LiveServer(settings(str(smollm2), options), prelude=fault.PRELUDE)
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def golden(live: LiveServer) -> dict[str, str]:
    """What each prompt is answered, alone and without a fault."""
    texts = {prompt: text_of(live.complete(prompt, max_tokens=TOKENS, ignore_eos=True)) for prompt in PROMPTS}
    assert texts[PROMPTS[0]].startswith(" Paris.")
    return texts


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def together(live: LiveServer, order: int) -> tuple[httpx.Response, list[httpx.Response]]:
    """The replies to a request that orders a fault, and to one for each prompt in the same batch."""
    with ThreadPoolExecutor(8) as pool:
        others: list[Future[httpx.Response]] = [
            pool.submit(live.complete, prompt, max_tokens=TOKENS, ignore_eos=True) for prompt in PROMPTS
        ]
        while live.load()["running"] < len(PROMPTS):
            time.sleep(0.005)
        faulty = pool.submit(live.complete, max_tokens=TOKENS, ignore_eos=True, seed=order)
        return faulty.result(), [other.result() for other in others]


def error_of(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    message: str = response.json()["error"]["message"]
    assert "Traceback" not in message and len(message) < 300
    return message


@pytest.mark.parametrize(
    ("order", "sentence"),
    [
        (fault.RAISE, "The engine failed while computing this request; its log has the details."),
        (fault.NAN, "The model's output for this request is not finite (NaN or infinity)."),
        (fault.MEMORY, "The engine ran out of memory while computing this request; try again later"),
    ],
)
def test_a_fault_in_one_request_fails_that_one(
    live: LiveServer, golden: dict[str, str], order: int, sentence: str
) -> None:
    """Those in the same batch get every token right, and so do those that come after, from the same engine."""
    engine = live.engine_pid()
    for _ in range(2):  # what the fault leaves behind might hurt the next ones
        faulty, others = together(live, order)
        assert sentence in error_of(faulty, 500)
        assert {prompt: text_of(other) for prompt, other in zip(PROMPTS, others, strict=True)} == golden
    assert text_of(live.complete(max_tokens=TOKENS, ignore_eos=True)) == golden[PROMPTS[0]]
    assert live.engine_pid() == engine
    live.wait_idle()


def test_a_fault_in_a_prompt_is_not_kept_for_the_next_one(live: LiveServer) -> None:
    """The prefix cache gives nobody the blocks of a request that failed."""
    expected = text_of(live.complete("Read this. " + LONG_PROMPT, max_tokens=8))
    body = {"prompt": "And this. " + LONG_PROMPT, "max_tokens": 8}
    assert "not finite" in error_of(live.complete(**body, seed=fault.NAN_IN_PROMPT), 500)
    again = live.complete(**body)
    assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert text_of(again) == text_of(live.complete(**body)) != ""
    assert text_of(live.complete("Read this. " + LONG_PROMPT, max_tokens=8)) == expected
    live.wait_idle()


@pytest.mark.parametrize("order", [fault.HANG, fault.HANG_WITH_LOCK, None], ids=["step", "step with lock", "SIGSTOP"])
def test_an_engine_that_hangs_is_replaced(live: LiveServer, golden: dict[str, str], order: int | None) -> None:
    """/health says so within five seconds (no step here is forecast to take half of one)."""
    engine = live.engine_pid()
    reader = Reader(live, seed=order or 0)
    if order is None:
        os.kill(engine, signal.SIGSTOP)
    error = reader.last()["error"]
    assert "no progress for 4.5 s" in error["message"] and error["type"] == "service_unavailable_error"
    health = live.http.get("/health")
    assert health.status_code == 503 and health.json()["error"]["code"] in ("restarting", "unresponsive")
    live.wait_ready()
    assert live.engine_pid() != engine and not Path(f"/proc/{engine}").exists()
    assert text_of(live.complete(max_tokens=TOKENS, ignore_eos=True)) == golden[PROMPTS[0]]


def test_what_an_engine_does_once_is_not_a_hang(live: LiveServer, golden: dict[str, str]) -> None:
    """Compiling takes longer than any step may."""
    engine = live.engine_pid()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(live.complete, max_tokens=TOKENS, ignore_eos=True, seed=fault.PREPARE)
        deadline = time.monotonic() + 10
        while live.load()["engine"] != "compiling":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        while not reply.done():
            assert live.http.get("/health").status_code == 200
            time.sleep(0.1)
        assert text_of(reply.result()) == golden[PROMPTS[0]]
    assert live.engine_pid() == engine


def test_an_engine_that_keeps_dying_on_one_request_comes_back(live: LiveServer, golden: dict[str, str]) -> None:
    """Clients repeat what was answered 503. The server is not given up for it."""
    for _ in range(4):
        message = error_of(live.complete(max_tokens=TOKENS, seed=fault.EXIT), 503)
        assert "exit code 3" in message and "not finished" in message
        live.wait_ready()
    assert text_of(live.complete(max_tokens=TOKENS, ignore_eos=True)) == golden[PROMPTS[0]]


def test_killed_under_load(live: LiveServer, golden: dict[str, str]) -> None:
    """Every request in flight and in the queue is told; the next one is answered right."""
    with ThreadPoolExecutor(12) as pool:
        replies = [pool.submit(live.complete, PROMPTS[i % 3], max_tokens=200, ignore_eos=True) for i in range(12)]
        while live.load()["waiting"] < 2:
            time.sleep(0.005)
        os.kill(live.engine_pid(), signal.SIGKILL)
        messages = {error_of(reply.result(), 503) for reply in replies}
    assert len(messages) == 1 and "SIGKILL" in messages.pop()
    live.wait_ready()
    live.wait_idle()
    assert text_of(live.complete(max_tokens=TOKENS, ignore_eos=True)) == golden[PROMPTS[0]]


def test_out_of_memory_at_load(launch: Callable[..., LiveServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEN_FAULT", "memory")
    live = launch(wait=False, prelude=fault.PRELUDE)
    assert live.process.wait(60) == 1
    assert "fen: there is not enough memory for this engine; choose a smaller model" in live.printed()
    assert "--kv-cache-tokens" in live.printed()


def test_a_full_disk_for_the_log(smollm2: Path, golden: dict[str, str]) -> None:
    """Nothing can be written, from the first line on: requests are answered and failed as ever."""
    with open("/dev/full", "wb") as full:
        options = settings(str(smollm2), {"dtype": "float32"})
        live = LiveServer(options, prelude=fault.PRELUDE, log=full)
        assert text_of(live.complete(max_tokens=TOKENS, ignore_eos=True)) == golden[PROMPTS[0]]
        assert "its log has" in error_of(live.complete(max_tokens=TOKENS, seed=fault.RAISE), 500)
        assert "exit code 3" in error_of(live.complete(max_tokens=TOKENS, seed=fault.EXIT), 503)
        live.wait_ready()
        assert text_of(live.complete(max_tokens=TOKENS, ignore_eos=True)) == golden[PROMPTS[0]]
        assert live.stop() == 0
