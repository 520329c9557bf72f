"""The server under load: its process, and what /proc says of it and of its engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import local_server
from bench.load.client import ask
from engine.errors import FenError


class Server:
    """A server on this machine. pid: of its front end; what that starts is its engine and its helpers."""

    def __init__(self, port: int, pid: int):
        self.port, self.pid = port, pid

    def engine_pid(self) -> int:
        """Of the engine process. ProcessLookupError while there is none."""
        for child in _children(self.pid):
            with contextlib.suppress(OSError):
                if b"engine" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return child
        raise ProcessLookupError("the engine process is not running")

    def memory(self) -> dict[str, int]:
        """Bytes of the front end's and the engine's own; what the engine has in memory of the files that it maps."""
        engine = self.engine_pid()
        return {"front end": _own(self.pid), "engine": _own(engine), "engine's files": _memory(engine, "RssFile")}

    def cpu_seconds(self) -> float:
        """Of the front end and all its children."""
        return sum(_cpu_seconds(pid) for pid in (self.pid, *_children(self.pid)))

    async def calm(self, seconds: float = 15.0) -> None:
        """Waits until nothing is in flight and no process of the server computes, for at most so long."""
        await self.wait_idle(seconds)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            before = _tree_seconds(self.pid)
            await asyncio.sleep(0.5)
            if _tree_seconds(self.pid) - before <= 0.05:
                return

    async def load(self) -> dict[str, Any]:
        answer = await ask(self.port, "GET", "/load")
        return dict(answer.json()) if answer.status == 200 else {}

    async def wait_idle(self, seconds: float = 60.0) -> dict[str, Any]:
        """GET /load once nothing is in flight and no block is held; what it says after `seconds` otherwise."""
        deadline = time.monotonic() + seconds
        while True:
            load = await self.load()
            busy = [load.get(name) for name in ("server_load", "running", "waiting", "kv_blocks_used")]
            if (not any(busy) and load) or time.monotonic() > deadline:
                return load
            await asyncio.sleep(0.05)

    async def wait_ready(self, seconds: float = 120.0) -> float:
        """time.monotonic() when /ready answers 200. Raises FenError after `seconds`."""
        deadline = time.monotonic() + seconds
        while (await ask(self.port, "GET", "/ready")).status != 200:
            if time.monotonic() > deadline:
                raise FenError(f"the server was not ready after {seconds:g} s")
            await asyncio.sleep(0.02)
        return time.monotonic()


@contextlib.contextmanager
def running(arguments: Sequence[str]) -> Iterator[Server]:
    """`fen serve` with these arguments, ready. FenError, with its last line, when it does not start."""
    port = local_server.free_port()
    with tempfile.TemporaryFile() as log:
        process = local_server.start(arguments, port, log)
        try:
            local_server.wait_ready(port, process)
            yield Server(port, process.pid)
        except RuntimeError as error:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            raise FenError(f"fen serve {' '.join(arguments)}: {error}: {lines[-1] if lines else 'no word'}") from None
        finally:
            local_server.stop(process)


def _children(pid: int) -> list[int]:
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def _tree_seconds(pid: int) -> float:
    return _cpu_seconds(pid) + sum(_tree_seconds(child) for child in _children(pid))


def _own(pid: int) -> int:
    """What nothing but the process gives back. Pages of mapped files are not: those of a table of embeddings come one
    by one, as its tokens are first met, and the system takes them when it wants, which would hide a leak."""
    return _memory(pid, "RssAnon", "RssShmem", "VmSwap")


def _memory(pid: int, *names: str) -> int:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in names) << 10


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
