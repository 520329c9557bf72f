"""The model's text, as it comes, into content and tool calls."""

from __future__ import annotations

import dataclasses
import re
import secrets
import string
from typing import Any

from server.tools import CallForm

LETTERS = string.ascii_letters + string.digits
HEAD = re.compile(r'\{\s*"name"\s*:\s*"([a-zA-Z0-9_-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
Json = dict[str, Any]


@dataclasses.dataclass
class Call:
    id: str
    name: str
    arguments: str = ""


class ToolParser:
    """Feed it text; what it made of it so far is in `content` and `calls`. The parts do not depend on the pieces.

    Calls follow a grammar (server.tools), so only their end may be missing, where the answer was cut off. What was cut
    off before its arguments began is content.
    """

    def __init__(self, form: CallForm):
        self.content = ""
        self.calls: list[Call] = []
        self._form = form
        self._in_calls = False
        self._buffer = ""  # not yet understood
        self._depth = 0  # of brackets in the arguments; 0: between arguments
        self._in_string = self._escaped = False

    def feed(self, text: str, last: bool = False) -> Json:
        """The delta that it adds to a streamed message: {"content"?, "tool_calls"?}. last: nothing follows."""
        content, at = len(self.content), len(self.calls)
        known = len(self.calls[-1].arguments) if self.calls else 0
        if not self._in_calls:
            text = self._text(text)
        if self._in_calls:
            self._buffer += text
            self._read_calls()
        if last:
            self._finish()
        return self._delta(content, at, known)

    def _finish(self) -> None:
        if not self._in_calls:
            self.content += self._buffer
        elif "{" in self._buffer:
            self.content += self._buffer[self._buffer.index("{") :]
        self._buffer = ""

    def _text(self, text: str) -> str:
        """Takes ordinary text, holding back what may begin the marker; returns what follows it."""
        text, marker = self._buffer + text, self._form.marker
        if marker:
            at = text.find(marker)
            self._in_calls = at >= 0
            held = max((n for n in range(1, len(marker)) if text.endswith(marker[:n])), default=0)
        else:  # a call is an answer that begins with "{"
            at, start = 0, text.lstrip()
            self._in_calls = start.startswith("{") and not self.content
            held = 0 if start or self.content else len(text)
        end = at if self._in_calls else len(text) - held
        self.content += text[:end]
        self._buffer = "" if self._in_calls else text[end:]
        return text[end + len(marker) :] if self._in_calls else ""

    def _read_calls(self) -> None:
        while self._buffer:
            if self._depth:
                self._read_arguments()
                continue
            head = HEAD.search(self._buffer)
            if head is None:
                return
            length = self._form.id_length
            id = "".join(secrets.choice(LETTERS) for _ in range(length))
            self.calls.append(Call(id if length < 24 else f"call_{id}", head[1]))
            self._buffer = self._buffer[head.end() :]
            self._read_arguments()

    def _read_arguments(self) -> None:
        for i, character in enumerate(self._buffer):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self.calls[-1].arguments += self._buffer[: i + 1]
                    self._buffer = self._buffer[i + 1 :]
                    return
        self.calls[-1].arguments += self._buffer
        self._buffer = ""

    def _delta(self, content: int, at: int, known: int) -> Json:
        delta: Json = {"content": self.content[content:]} if len(self.content) > content else {}
        entries: list[Json] = []
        if at and len(self.calls[at - 1].arguments) > known:
            entries.append({"index": at - 1, "function": {"arguments": self.calls[at - 1].arguments[known:]}})
        for index, call in enumerate(self.calls[at:], at):
            entries.append({"index": index, **whole(call)})
        return delta | ({"tool_calls": entries} if entries else {})


def whole(call: Call) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
