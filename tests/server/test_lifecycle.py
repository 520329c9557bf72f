"""Loading, the engine's death and return, and the ways a server stops."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from engine.errors import FenError
from server.run import claim_port
from tests.server.live import LAUNCH, LiveServer, events, free_port, settings

LONG = {"prompt": "Count to a thousand:", "max_tokens": 480, "ignore_eos": True, "temperature": 0}


class Reader(threading.Thread):
    """Reads one streamed reply in the background."""

    def __init__(self, live: LiveServer, **body: Any):
        super().__init__(daemon=True)
        self.live, self.body = live, LONG | {"stream": True} | body
        self.events: list[dict[str, Any]] = []
        self.begun = threading.Event()
        self.start()
        assert self.begun.wait(20), "the stream did not begin"

    def run(self) -> None:
        with httpx.stream("POST", self.live.url + "/v1/completions", json=self.body, timeout=60) as response:
            assert response.status_code == 200
            with contextlib.suppress(httpx.RemoteProtocolError):  # the connection broke: there is no last event
                for event in events(response.iter_text()):
                    self.events.append(event)
                    self.begun.set()

    def last(self) -> dict[str, Any]:
        self.join(20)
        assert not self.is_alive(), "the stream did not end"
        return self.events[-1]


def wait_port(live: LiveServer) -> httpx.Response:
    """The first answer that is not a refused connection."""
    while True:
        try:
            return live.http.get("/health")
        except httpx.TransportError:
            assert live.process.poll() is None, live.printed()
            time.sleep(0.005)


def test_loading_then_engine_killed_then_drained(launch: Callable[..., LiveServer]) -> None:
    """One server's life: 503 while loading; SIGKILL of the engine; recovery; SIGTERM with a stream open."""
    live = launch(wait=False)
    loading = wait_port(live)
    assert loading.status_code == 503 and loading.json()["error"]["code"] == "loading"
    early = live.complete()
    assert early.status_code == 503 and int(early.headers["retry-after"]) >= 1
    live.wait_ready()
    assert live.complete(max_tokens=2).json()["choices"][0]["text"] == " Paris."

    reader = Reader(live)
    os.kill(live.engine_pid(), signal.SIGKILL)
    error = reader.last()["error"]
    assert "SIGKILL" in error["message"] and error["type"] == "service_unavailable_error"
    health = live.http.get("/health")
    assert health.status_code == 503 and health.json()["error"]["code"] == "restarting"
    assert "SIGKILL" in health.json()["error"]["message"]
    refused = live.complete()
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert live.http.get("/v1/models").status_code == 200
    live.wait_ready()
    assert live.complete(max_tokens=2).json()["choices"][0]["text"] == " Paris."
    live.wait_idle()

    reader = Reader(live, max_tokens=40)
    live.process.send_signal(signal.SIGTERM)
    while live.http.get("/ready").status_code == 200:
        time.sleep(0.005)
    assert live.complete().json()["error"]["code"] == "draining"
    last = reader.last()["choices"][0]
    assert last["finish_reason"] == "length"
    assert live.process.wait(20) == 0


def test_drain_timeout_aborts_and_exits_0(launch: Callable[..., LiveServer]) -> None:
    live = launch(drain_timeout=0.3)
    engine = live.engine_pid()
    readers = [Reader(live), Reader(live, n=2)]
    began = time.monotonic()
    live.process.send_signal(signal.SIGTERM)
    for reader in readers:
        reader.last()
        choices = [choice for event in reader.events for choice in event["choices"]]
        finished = {choice["index"]: choice["finish_reason"] for choice in choices if choice["finish_reason"]}
        assert finished and set(finished.values()) == {"abort"}
    assert live.process.wait(20) == 0
    assert time.monotonic() - began < 10
    assert not psutil.pid_exists(engine)
    banner = live.printed()
    for text in (
        "smollm2",
        "Q4_1",
        "135 million",
        "4,096 tokens",
        f"curl {live.url}/v1/chat/completions",
        "Finishing 3",
    ):
        assert text in banner


def test_sigterm_lets_the_queue_finish_too(launch: Callable[..., LiveServer]) -> None:
    """One stream runs, two requests wait for its place: all three get every token, then the server ends."""
    live = launch(engine={"max_num_seqs": 1})
    expected = live.complete(max_tokens=12, ignore_eos=True).json()["choices"][0]["text"]
    reader = Reader(live, max_tokens=60)
    with ThreadPoolExecutor(2) as pool:
        queued = [pool.submit(live.complete, max_tokens=12, ignore_eos=True) for _ in range(2)]
        while live.load()["waiting"] < 2:
            time.sleep(0.005)
        live.process.send_signal(signal.SIGTERM)
        assert reader.last()["choices"][0]["finish_reason"] == "length"
        assert [reply.result().json()["choices"][0]["text"] for reply in queued] == [expected] * 2
    assert live.process.wait(20) == 0
    assert "Finishing 3 completions" in live.printed()


def signal_and_wait(live: LiveServer, number: signal.Signals, lines: int) -> None:
    """Sends it, until the log says so many times that the server drains."""
    live.process.send_signal(number)
    while live.printed().count("INFO draining") < lines:
        time.sleep(0.005)


def test_second_signal_stops_now(launch: Callable[..., LiveServer]) -> None:
    live = launch(drain_timeout=60)
    engine = live.engine_pid()
    reader = Reader(live)
    signal_and_wait(live, signal.SIGTERM, 1)
    live.process.send_signal(signal.SIGINT)
    assert reader.last()["choices"][0]["finish_reason"] == "abort"
    assert live.process.wait(10) == 0
    assert "Finishing 1 completion," in live.printed() and "Traceback" not in live.printed()
    assert not psutil.pid_exists(engine)


def test_third_signal_waits_for_nothing(launch: Callable[..., LiveServer]) -> None:
    """Not even for an engine that does not answer."""
    live = launch(drain_timeout=60)
    engine = psutil.Process(live.engine_pid())
    Reader(live)
    engine.suspend()
    with ThreadPoolExecutor(1) as pool:
        unanswered = pool.submit(live.complete)
        while live.load()["server_load"] < 2:
            time.sleep(0.005)
        for lines in (1, 2):
            signal_and_wait(live, signal.SIGINT, lines)
        live.process.send_signal(signal.SIGINT)
        assert live.process.wait(5) == 0
        reply = unanswered.result()  # its last words, unless the third signal came before them
        assert reply.status_code == 503 or reply.json()["choices"][0]["finish_reason"] == "abort"
    assert "Traceback" not in live.printed()
    with contextlib.suppress(psutil.NoSuchProcess):  # the kernel may have ended what nobody could wake any more
        engine.resume()
    engine.wait(10)


def test_port_in_use_is_one_sentence(server: LiveServer, smollm2: Path) -> None:
    taken = settings(str(smollm2))
    taken.port = server.settings.port
    with pytest.raises(FenError, match=f"port {taken.port} .* in use.*--port {taken.port + 1}"):
        claim_port(taken.host, taken.port)
    with pytest.raises(FenError, match="--host"):
        claim_port("no.such.host.invalid", 8000)
    claim_port("127.0.0.1", free_port()).close()


def test_an_engine_that_cannot_start_ends_the_server(smollm2: Path) -> None:
    """The engine process refuses; the server says its sentence and ends, it does not stay half alive."""
    broken = settings(str(smollm2), {"device": "abacus"})
    command = [sys.executable, "-c", LAUNCH, msgspec.json.encode(broken).decode()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "abacus" in result.stderr and "Traceback" not in result.stderr
