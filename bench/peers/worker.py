"""One engine in a process of its own, loaded once and measured on request: JSON lines over its stdin and stdout.

{"op": "load", ...} -> {"settings": str, "versions": {...}}; {"op": "generate", "prompts": [[ids]], "new_tokens": n} ->
{"first_seconds", "seconds", "tokens"} as in bench.local_engine.Timing. A failure answers {"error": str}. The process
takes the time itself and waits on its stdin in between, so it costs the others nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from bench.local_engine import Timing


class PeerError(Exception):
    """The engine cannot be measured; the message says why."""


class Worker:
    """The measuring side. `load` goes to the worker as it is."""

    def __init__(self, command: list[str], environment: dict[str, str], **load: Any):
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **environment},
            )
        except OSError as error:
            raise PeerError(f"{command[0]} does not start: {error.strerror}") from None
        self.pid = self._process.pid
        try:
            answer = self._ask({"op": "load", **load})
        except BaseException:
            self.close()
            raise
        self.settings: str = answer["settings"]
        self.versions: dict[str, str] = answer["versions"]

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        """Completes `prompts` together, greedily, past any end-of-text token. Raises PeerError."""
        return Timing(**self._ask({"op": "generate", "prompts": prompts, "new_tokens": new_tokens}))

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"the process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer


def serve(load: Callable[..., dict[str, Any]], generate: Callable[[list[list[int]], int], Timing]) -> None:
    """The engine's side: answers requests until its stdin ends. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request.pop("op") == "load":
                answer = load(**request)
            else:
                timing = generate(**request)
                answer = {"first_seconds": timing.first_seconds, "seconds": timing.seconds, "tokens": timing.tokens}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
