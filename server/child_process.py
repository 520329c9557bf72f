"""A child process that answers one request after another over its standard input and output, and may be killed."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from engine.errors import RequestError

START_SECONDS = 20.0  # until a new child answers for the first time
LENGTH = 8  # bytes of a frame's length


class Late(Exception):
    """No answer in time."""


class ChildProcess:
    """Runs `python -m MODULE ARGUMENTS` from the first request on, and anew when it ended. Safe to call from several
    threads; they take turns. environment: all that it sees of one, beside what it imports from."""

    def __init__(self, module: str, arguments: Sequence[str], first: bytes, environment: Mapping[str, str]):
        """`first`: the frame that it gets first, and answers with an empty one."""
        self._module, self._arguments, self._first, self._environment = module, arguments, first, environment
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._closed = False

    def start(self) -> None:
        """So that the first request need not wait for it."""
        with self._lock:
            self._start()

    def ask(self, frame: bytes, seconds: float | None = None) -> bytes:
        """Blocks. Raises Late after `seconds`; EOFError or OSError when it ends, and also ends when asked anew;
        RequestError once closed."""
        with self._lock:
            try:
                try:
                    return self._ask(frame, seconds)
                except (EOFError, OSError):  # killed since the last time: once more with a new one
                    self._kill()
                    return self._ask(frame, seconds)
            except (Late, EOFError, OSError):
                self._kill()
                raise

    def close(self) -> None:
        """A request under way ends with an error."""
        self._closed = True
        if (child := self._child) is not None:
            child.kill()
        with self._lock:
            self._kill()

    def _ask(self, frame: bytes, seconds: float | None) -> bytes:
        child = self._start()
        assert child.stdin is not None and child.stdout is not None
        write(child.stdin, frame)
        return _read_before(child.stdout.fileno(), None if seconds is None else time.monotonic() + seconds)

    def _start(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise RequestError("the server is shutting down")
        if self._child is None:
            path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", self._module, *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**self._environment, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C in the terminal does not reach it
            )
            assert self._child.stdin is not None and self._child.stdout is not None
            write(self._child.stdin, self._first)
            _read_before(self._child.stdout.fileno(), time.monotonic() + START_SECONDS)
        return self._child

    def _kill(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # what it had not read yet
                        pipe.close()


def write(pipe: BinaryIO | Any, frame: bytes) -> None:
    pipe.write(len(frame).to_bytes(LENGTH, "big") + frame)
    pipe.flush()


def read(pipe: BinaryIO) -> bytes | None:
    """The next frame; None at the end."""
    head = pipe.read(LENGTH)
    return pipe.read(int.from_bytes(head, "big")) if len(head) == LENGTH else None


def _read_before(fd: int, deadline: float | None) -> bytes:
    """One frame. Raises Late, or EOFError where the other side ended."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    data, size = bytearray(), LENGTH
    while len(data) < size:
        if not poll.poll(None if deadline is None else max(deadline - time.monotonic(), 0) * 1e3):
            raise Late
        piece = os.read(fd, 2**20)
        if not piece:
            raise EOFError
        data += piece
        if len(data) >= LENGTH:
            size = LENGTH + int.from_bytes(data[:LENGTH], "big")
    return bytes(data[LENGTH:])
