"""One server for all tests of real clients, started as a user starts it. These tests run in an environment of their own
(`make test-clients`), which has the clients and nothing of Fen; FEN_PYTHON is the Python that has Fen."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m-instruct"
READY_SECONDS = 300


@pytest.fixture(scope="session")
def model() -> str:
    return MODEL


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """The server's address, without a path; it serves SmolLM2-135M-Instruct."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    python = os.environ.get("FEN_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
    options = ["--model", MODEL, "--port", str(port), "--max-model-len", "2048", "--kv-cache-tokens", "16384"]
    server = subprocess.Popen([python, "-m", "server.cli", "serve", *options], cwd=ROOT)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_ready(address, server)
        yield address
    finally:
        server.terminate()
        status = server.wait(60)
    assert status == 0


def wait_ready(address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address + "/ready"):
                return
        except (urllib.error.URLError, ConnectionError):
            assert server.poll() is None, "the server ended while it was loading"
            time.sleep(0.1)
    raise AssertionError(f"the server did not become ready within {READY_SECONDS} s")
