"""`fen chat`: a conversation in the terminal, with an engine of its own or with a server that runs already."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from typing import Any, Protocol

from rich.console import Console

from engine.errors import FenError
from engine.messages import SamplingParams
from server.local_model import REST_OF_CONTEXT, Messages, Usage

HELP = "/exit ends, /new starts over, Ctrl-C stops an answer"


class Model(Protocol):
    """Who answers: server.local_model.LocalModel, or RemoteModel."""

    usage: Usage

    def chat(self, messages: Messages, params: SamplingParams) -> Generator[str, None, None]: ...


class RemoteModel:
    """A server that speaks the OpenAI API, at `url` (with or without /v1). Asks it for its model's name at once."""

    def __init__(self, url: str):
        if not url.startswith(("http://", "https://")):
            raise FenError(f"--url takes an address such as http://127.0.0.1:8000, not {url!r}")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.usage = Usage()
        with self.call("/v1/models") as reply:
            models = json.load(reply)["data"]
        if not models:
            raise FenError(f"the server at {self.url} serves no model")
        self.model = str(models[0]["id"])

    def chat(self, messages: Messages, params: SamplingParams) -> Generator[str, None, None]:
        """The pieces of the answer; afterwards `usage` tells about it. Leaving early ends the request."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": params.temperature,
            "top_p": params.top_p,
        }
        if params.max_tokens != REST_OF_CONTEXT:
            body["max_tokens"] = params.max_tokens
        usage = self.usage = Usage()
        start = time.monotonic()
        with self.call("/v1/chat/completions", body) as reply:
            for event in _events(reply):
                if "error" in event:
                    raise FenError(event["error"]["message"])
                for choice in event["choices"]:
                    usage.finish_reason = choice.get("finish_reason") or usage.finish_reason
                    text = choice["delta"].get("content")
                    if text:
                        usage.first_seconds = usage.first_seconds or time.monotonic() - start
                        usage.seconds = time.monotonic() - start - usage.first_seconds
                        yield text
                if counts := event.get("usage"):
                    usage.prompt_tokens = counts["prompt_tokens"]
                    usage.completion_tokens = counts["completion_tokens"]
                    usage.cached_tokens = (counts.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                    details = counts.get("cost_details") or {}  # a Fen server
                    usage.charge(details.get("device_seconds"))
                    usage.usd_per_hour = (details.get("price") or {}).get("usd_per_device_hour")

    @contextlib.contextmanager
    def call(self, path: str, body: dict[str, Any] | None = None) -> Iterator[http.client.HTTPResponse]:
        """A GET, or a POST of `body`. Raises FenError, also when what is done with the reply finds it malformed."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("FEN_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=300) as reply:
                yield reply
        except urllib.error.HTTPError as error:
            raise FenError(f"the server at {self.url} answers {error.code}: {_message(error)}") from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
            raise FenError(
                f"the server at {self.url} cannot be reached ({reason}): is `fen serve` running there?"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise FenError(f"what answers at {self.url} does not speak the OpenAI API") from None


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)


def _events(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Server-sent events with JSON data, up to [DONE]."""
    for line in reply:
        if line.startswith(b"data:"):
            data = line[len(b"data:") :].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)


def converse(model: Model, params: SamplingParams, system: str | None, console: Console) -> None:
    """Ask and answer until /exit or the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() line editing and a history)
    opening: Messages = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    console.print(HELP, style="dim")
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if question == "/exit":
            return
        if question == "/new":
            messages = list(opening)
        elif question.startswith("/"):
            console.print(HELP, style="dim")
        elif question:
            messages.append({"role": "user", "content": question})
            answer = ""
            with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C, or one too late
                answer = _answer(model, messages, params, console)
            if answer:
                messages.append({"role": "assistant", "content": answer})
            else:
                messages.pop()


def _answer(model: Model, messages: Messages, params: SamplingParams, console: Console) -> str:
    """Prints the answer as it comes, and what may have cut it short."""
    text = ""
    pieces = model.chat(messages, params)
    try:
        for piece in pieces:
            text += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        pieces.close()
    except FenError as error:
        console.print(f"\n{error}" if text else str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return text
    console.print(f"\n{model.usage.line()}", style="dim", highlight=False, soft_wrap=True)
    return text
