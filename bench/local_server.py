"""A server of one's own for a measurement: `fen serve` as a process, ready, and ended afterwards."""

from __future__ import annotations

import contextlib
import http.client
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO

from engine.errors import FenError

READY_SECONDS = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(arguments: Sequence[str], port: int, log: IO[bytes] | int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """`fen serve` on `port` with `arguments` added; `log` gets what it prints."""
    command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port), *arguments]
    return subprocess.Popen(command, stdout=log, stderr=log)


def wait_ready(port: int, process: subprocess.Popen[bytes]) -> float:
    """time.monotonic() when /ready answered 200. RuntimeError if the server ends or is not ready in time."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return time.monotonic()
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.02)
    raise RuntimeError(f"the server was not ready after {READY_SECONDS} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def local_server(arguments: Sequence[str]) -> Iterator[str]:
    """The address of a server that is ready. FenError, with its own last line, when it does not start."""
    port = free_port()
    with tempfile.TemporaryFile() as log:
        process = start(arguments, port, log)
        try:
            wait_ready(port, process)
            yield f"http://127.0.0.1:{port}"
        except RuntimeError as error:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            raise FenError(f"fen serve {' '.join(arguments)}: {error}: {lines[-1] if lines else 'no word'}") from None
        finally:
            stop(process)
