"""What every request gets, whatever its route: a request id, a bound on its body, HEAD on GET routes, an error body."""

from __future__ import annotations

import re
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, error_response
from server.settings import MAX_BODY_BYTES

UNSAFE = re.compile(rb"[^A-Za-z0-9._:-]")
MAX_DISCARDED_BYTES = 4 * MAX_BODY_BYTES  # a client that is still sending would not read the 413


class Envelope:
    """Pure ASGI, so that streaming and disconnects pass through untouched."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = UNSAFE.sub(b"", given)[:64] or uuid.uuid4().hex.encode()
        head = scope["method"] == "HEAD"
        if head:
            scope = {**scope, "method": "GET"}
        begun = False

        async def reply(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers: list[Any] = list(message.get("headers", ()))
                headers.append((b"x-request-id", request_id))
                message = {**message, "headers": headers}
            elif head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self.app(scope, bounded(scope, receive), reply)
        except Exception as error:
            if begun:
                raise
            await error_response(error)(scope, receive, reply)


def bounded(scope: Scope, receive: Receive) -> Receive:
    """`receive`, raising ApiError 413 when the body is longer than MAX_BODY_BYTES."""
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"")
    size = int(length) if length.isdigit() else 0
    received = 0

    async def receive_bounded() -> Message:
        nonlocal received
        if size > MAX_BODY_BYTES and b"expect" in headers:  # the client asked before sending
            raise ApiError(413, "the body is larger than 8 MiB")
        message = await receive()
        received += len(message.get("body", b""))
        if max(size, received) <= MAX_BODY_BYTES:
            return message
        while message.get("more_body") and received < MAX_DISCARDED_BYTES:
            message = await receive()
            received += len(message.get("body", b""))
        raise ApiError(413, "the body is larger than 8 MiB")

    return receive_bounded
