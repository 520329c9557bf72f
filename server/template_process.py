"""Chat templates in a process of their own, which may be killed: a template is a program of somebody else's.

Jinja's sandbox keeps a template from Python's objects, not from `10**10**7` or `'a' * 10**9`. The child has limits on
memory and CPU, writes no file, forks nothing, and sees none of this process's environment. It is started once and
answers in well under a millisecond. As a program this module is that child.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from engine.chat import render_chat
from engine.errors import CheckpointError, RequestError
from server.child_process import ChildProcess, Late, read, write

SECONDS = 2.0  # for one rendering
MEMORY_BYTES = 512 * 2**20  # of address space
OUTPUT_CHARACTERS = 32 * 2**20

pack, unpack = msgspec.msgpack.encode, msgspec.msgpack.decode


class TemplateProcess(ChildProcess):
    """Renders one checkpoint's template. Safe to call from several threads; they take turns."""

    def __init__(self, template: str, special_tokens: Mapping[str, str]):
        environment = {name: os.environ[name] for name in ("TZ", "LANG") if name in os.environ}
        super().__init__("server.template_process", (), pack([template, dict(special_tokens)]), environment)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """As engine.chat.render_chat; blocks. RequestError also for what takes too long or too much memory."""
        try:
            answer = self.ask(pack([messages, add_generation_prompt, tools]), SECONDS)
        except Late:
            raise RequestError(
                f"the chat template needs more than {SECONDS:g} s for these messages", "messages"
            ) from None
        except (EOFError, OSError):
            raise RequestError("the chat template fails on these messages", "messages") from None
        kind, text = unpack(answer)
        if kind == "text":
            return str(text)
        raise CheckpointError(text) if kind == "checkpoint" else RequestError(text, "messages")


# The child.


class _Names:
    def __init__(self, special_tokens: dict[str, str]):
        self.special_tokens = special_tokens


def _limit(kind: int, value: int) -> None:
    with contextlib.suppress(ValueError, OSError):  # not every system has every limit
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def _run() -> None:
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    template, special_tokens = unpack(read(requests) or b"")
    names = _Names(special_tokens)
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    for kind in (resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        _limit(kind, 0)
    write(replies, b"")
    while (frame := read(requests)) is not None:
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
        write(replies, answer)


if __name__ == "__main__":
    _run()
