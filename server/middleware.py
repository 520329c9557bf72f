"""What every request gets, whatever its route: a request id, bounds on its head and body, HEAD on GET routes, an error
body, and headers that tell a browser what the reply may do."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, error_response
from server.settings import BODY_SECONDS, MAX_BODY_BYTES, MAX_HEAD_BYTES, MAX_HEADERS

UNSAFE = re.compile(rb"[^A-Za-z0-9._:-]")
MAX_DISCARDED_BYTES = 4 * MAX_BODY_BYTES  # a client that is still sending would not read the 413
# A large body is taken slowly, some 10 MB a second: what it costs at full speed is a core that the engine has not got.
LARGE_BODY_BYTES = 128 << 10
PAUSE_SECONDS = 0.005
CLIENT_LEFT = 499  # nginx's status for a reply that nobody waited for
Done = Callable[[Scope, str, int, float], None]
NOSNIFF = (b"x-content-type-options", b"nosniff")
# Of HTML: all of it is ours and loads nothing from elsewhere.
POLICY = b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"


def browser_headers(content_type: bytes) -> list[tuple[bytes, bytes]]:
    if not content_type.startswith(b"text/html"):
        return [NOSNIFF]
    return [
        NOSNIFF,
        (b"content-security-policy", POLICY),
        (b"referrer-policy", b"no-referrer"),
        (b"x-frame-options", b"DENY"),
        (b"cross-origin-opener-policy", b"same-origin"),
    ]


class Envelope:
    """Pure ASGI, so that streaming and disconnects pass through untouched."""

    def __init__(self, app: ASGIApp, done: Done):
        """`done`: called once a request is over."""
        self.app = app
        self.done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = UNSAFE.sub(b"", given)[:64] or uuid.uuid4().hex.encode()
        head = scope["method"] == "HEAD"
        if head:
            scope = {**scope, "method": "GET"}
        arrival, begun, status = time.monotonic(), False, CLIENT_LEFT

        async def reply(message: Message) -> None:
            nonlocal begun, status
            if message["type"] == "http.response.start":
                begun, status = True, message["status"]
                headers: list[Any] = list(message.get("headers", ()))
                content_type = next((value for name, value in headers if name.lower() == b"content-type"), b"")
                headers += [(b"x-request-id", request_id), *browser_headers(content_type)]
                message = {**message, "headers": headers}
            elif head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            if len(scope["headers"]) > MAX_HEADERS:
                raise ApiError(431, f"the request has {len(scope['headers'])} headers; at most {MAX_HEADERS}")
            if (size := sum(len(name) + len(value) for name, value in scope["headers"])) > MAX_HEAD_BYTES:
                raise ApiError(431, f"the request's headers have {size} bytes; at most {MAX_HEAD_BYTES}")
            await self.app(scope, bounded(scope, receive), reply)
        except asyncio.CancelledError:  # the server ends, and this reply did not in time
            if not begun:
                gone = ApiError(503, "the server is shutting down", code="draining", retry_after=5)
                await error_response(gone)(scope, receive, reply)
        except Exception as error:
            if begun:
                raise
            await error_response(error)(scope, receive, reply)
        finally:
            self.done(scope, request_id.decode(), status, time.monotonic() - arrival)


def bounded(scope: Scope, receive: Receive) -> Receive:
    """`receive`, raising ApiError 413 when the body is longer than MAX_BODY_BYTES, 408 when it stops coming."""
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"")
    size = int(length) if length.isdigit() and len(length) < 20 else 0
    received = 0
    complete = False

    async def piece() -> Message:
        nonlocal received, complete
        try:  # once the body is there, this waits for the client to leave
            async with asyncio.timeout(None if complete else BODY_SECONDS):
                message = await receive()
        except TimeoutError:
            raise ApiError(408, f"the body stopped coming for {BODY_SECONDS:g} s") from None
        received += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if received > LARGE_BODY_BYTES and not complete:
            await asyncio.sleep(PAUSE_SECONDS)
        return message

    async def receive_bounded() -> Message:
        if size > MAX_BODY_BYTES and b"expect" in headers:  # the client asked before sending
            raise ApiError(413, "the body is larger than 8 MiB")
        message = await piece()
        if max(size, received) <= MAX_BODY_BYTES:
            return message
        while message.get("more_body") and received < MAX_DISCARDED_BYTES:
            message = await piece()
        raise ApiError(413, "the body is larger than 8 MiB")

    return receive_bounded
