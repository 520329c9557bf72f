"""A server process started the way `fen serve` starts it, and what tests ask of it. Every reply is held against its
description (tests.server.conform)."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO, Any

import httpx
import msgspec
import psutil

from engine.messages import EngineOptions
from server.settings import ServerSettings
from tests.server.conform import check_event, check_reply

LAUNCH = """
import sys, msgspec
from engine.errors import FenError
from server.run import serve
from server.settings import ServerSettings
try:
    serve(msgspec.json.decode(sys.argv[1], type=ServerSettings))
except FenError as error:
    sys.exit(f"fen: {error}")
"""
READY_SECONDS = 120


class LiveServer:
    """A server process; `http` is a client for it. `prelude`: Python run in it first."""

    def __init__(self, settings: ServerSettings, wait: bool = True, prelude: str = "", log: IO[bytes] | None = None):
        self.settings = settings
        self.url = f"http://127.0.0.1:{settings.port}"
        command = [sys.executable, "-c", prelude + LAUNCH, msgspec.json.encode(settings).decode()]
        self.log = log or tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(command, stderr=self.log)
        self.http = httpx.Client(base_url=self.url, timeout=60, event_hooks={"response": [check_reply]})
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if self.http.get("/ready").status_code == 200:
                    return
            assert self.process.poll() is None, self.printed()
            time.sleep(0.05)
        raise AssertionError("the server did not become ready")

    def printed(self) -> str:
        """What it wrote to standard error so far."""
        self.log.seek(0)
        return self.log.read().decode()

    def engine_pid(self) -> int:
        children = psutil.Process(self.process.pid).children()
        kinds = ("engine.core.process", "faulty_engine.py")  # the second: tests.server.faulty_engine
        (engine,) = (child for child in children if any(kind in " ".join(child.cmdline()) for kind in kinds))
        return engine.pid

    def load(self) -> dict[str, Any]:
        return self.http.get("/load").json()

    def wait_idle(self, seconds: float = 10.0) -> None:
        """Until nothing is in flight and every block is free."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            load = self.load()
            if load["server_load"] == load["running"] == load["waiting"] == load["kv_blocks_used"] == 0:
                return
            time.sleep(0.02)
        raise AssertionError(f"still busy after {seconds} s: {load}")

    def metric(self, name: str) -> float:
        """Sum over the label sets of one sample name."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))

    def complete(self, prompt: Any = "The capital of France is", **fields: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": prompt, "temperature": 0, **fields})

    def chat(self, text: str = "What is the capital of France?", **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        return self.http.post("/v1/chat/completions", json={"messages": messages, "temperature": 0, **fields})

    def stream(self, path: str, **body: Any) -> Iterator[dict[str, Any]]:
        """The events of a streamed reply; checks the framing and the end."""
        with self.http.stream("POST", path, json={"temperature": 0, "stream": True, **body}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            for event in events(response.iter_text()):
                check_event(path, event)
                yield event

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self.http.close()
        return code


def events(pieces: Iterator[str]) -> Iterator[dict[str, Any]]:
    done, buffer = False, ""
    for piece in pieces:
        buffer += piece
        while "\n\n" in buffer:
            event, buffer = buffer.split("\n\n", 1)
            if event.startswith(":"):
                continue
            assert event.startswith("data: ") and not done, event
            if event == "data: [DONE]":
                done = True
            else:
                yield json.loads(event.removeprefix("data: "))
    assert done and not buffer, "the stream ended without data: [DONE]"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def settings(model: str, engine: dict[str, Any] | None = None, **server: Any) -> ServerSettings:
    """One thread: other tests may run beside it."""
    options: dict[str, Any] = {"model": model, "threads": 1, "kv_cache_tokens": 4096, "max_model_len": 512}
    options |= engine or {}
    server = {"port": free_port(), "served_model_name": ["smollm2"], "engine": EngineOptions(**options)} | server
    return ServerSettings(**server)
