"""Chat templates in a process of their own, which may be killed: a template is a program of somebody else's.

Jinja's sandbox keeps a template from Python's objects, not from `10**10**7` or `'a' * 10**9`. The child has limits on
memory and CPU, writes no file, forks nothing, and sees none of this process's environment. It is started once and
answers in well under a millisecond. As a program this module is that child.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import msgspec

from engine.chat import render_chat
from engine.errors import CheckpointError, RequestError

SECONDS = 2.0  # for one rendering
MEMORY_BYTES = 512 * 2**20  # of address space
OUTPUT_CHARACTERS = 32 * 2**20
START_SECONDS = 20.0  # until a new child answers for the first time
LENGTH = 8  # bytes of a frame's length

pack, unpack = msgspec.msgpack.encode, msgspec.msgpack.decode


class _Late(Exception):
    """No answer in time."""


class TemplateProcess:
    """Renders one checkpoint's template. Safe to call from several threads; they take turns."""

    def __init__(self, template: str, special_tokens: Mapping[str, str]):
        self._first = pack([template, dict(special_tokens)])
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._closed = False

    def start(self) -> None:
        """So that the first rendering need not wait for it."""
        with self._lock:
            self._start()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """As engine.chat.render_chat; blocks. RequestError also for what takes too long or too much memory."""
        frame = pack([messages, add_generation_prompt, tools])
        with self._lock:
            try:
                try:
                    answer = self._ask(frame)
                except (EOFError, OSError):  # killed since the last time: once more with a new one
                    self._kill()
                    answer = self._ask(frame)
            except _Late:
                self._kill()
                raise RequestError(
                    f"the chat template needs more than {SECONDS:g} s for these messages", "messages"
                ) from None
            except (EOFError, OSError):
                self._kill()
                raise RequestError("the chat template fails on these messages", "messages") from None
        kind, text = unpack(answer)
        if kind == "text":
            return str(text)
        raise CheckpointError(text) if kind == "checkpoint" else RequestError(text, "messages")

    def close(self) -> None:
        """A rendering under way ends with an error."""
        self._closed = True
        if (child := self._child) is not None:
            child.kill()
        with self._lock:
            self._kill()

    def _ask(self, frame: bytes) -> bytes:
        child = self._start()
        assert child.stdin is not None and child.stdout is not None
        _write(child.stdin, frame)
        return _read_before(child.stdout.fileno(), time.monotonic() + SECONDS)

    def _start(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise RequestError("the server is shutting down")
        if self._child is None:
            path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "server.template_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={"PYTHONPATH": path} | {name: os.environ[name] for name in ("TZ", "LANG") if name in os.environ},
                start_new_session=True,  # Ctrl-C in the terminal does not reach it
            )
            assert self._child.stdin is not None and self._child.stdout is not None
            _write(self._child.stdin, self._first)
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


def _write(pipe: BinaryIO | Any, frame: bytes) -> None:
    pipe.write(len(frame).to_bytes(LENGTH, "big") + frame)
    pipe.flush()


def _read_before(fd: int, deadline: float) -> bytes:
    """One frame. Raises _Late, or EOFError where the other side ended."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    data, size = bytearray(), LENGTH
    while len(data) < size:
        if not poll.poll(max(deadline - time.monotonic(), 0) * 1e3):
            raise _Late
        piece = os.read(fd, 2**20)
        if not piece:
            raise EOFError
        data += piece
        if len(data) >= LENGTH:
            size = LENGTH + int.from_bytes(data[:LENGTH], "big")
    return bytes(data[LENGTH:])


# The child.


class _Names:
    def __init__(self, special_tokens: dict[str, str]):
        self.special_tokens = special_tokens


def _limit(kind: int, value: int) -> None:
    with contextlib.suppress(ValueError, OSError):  # not every system has every limit
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def _run() -> None:
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    template, special_tokens = unpack(_read(requests) or b"")
    names = _Names(special_tokens)
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    for kind in (resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        _limit(kind, 0)
    _write(replies, b"")
    while (frame := _read(requests)) is not None:
        # The parent kills what takes too long; where there is no parent any more, this does.
        usage = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime + 2 * SECONDS) + 1)
        try:
            messages, add_generation_prompt, tools = unpack(frame)
            text = render_chat(template, messages, names, add_generation_prompt, tools)
            if len(text) > OUTPUT_CHARACTERS:
                raise RequestError(f"the chat template makes {len(text)} characters of these messages, too many")
            answer = pack(["text", text])
        except CheckpointError as error:
            answer = pack(["checkpoint", str(error)])
        except RequestError as error:
            answer = pack(["request", str(error)])
        except MemoryError:
            answer = pack(["request", "the chat template needs too much memory for these messages"])
        _write(replies, answer)


def _read(pipe: BinaryIO) -> bytes | None:
    head = pipe.read(LENGTH)
    return pipe.read(int.from_bytes(head, "big")) if len(head) == LENGTH else None


if __name__ == "__main__":
    _run()
