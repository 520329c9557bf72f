"""Routes with a JSON body: 415 for another content type or a compressed one, and a stricter parser than the standard
library's."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from server.errors import ApiError

MAX_DEPTH = 100  # of arrays and objects inside each other


class JsonRequest(Request):
    async def json(self) -> Any:
        body = (await self.body()).removeprefix(codecs.BOM_UTF8)
        try:
            value = msgspec.json.decode(body)
            if body.count(b"[") + body.count(b"{") > MAX_DEPTH and deeper(value, MAX_DEPTH):
                raise RecursionError
            return value
        except RecursionError:
            message = f"the body is nested too deeply; at most {MAX_DEPTH} arrays and objects inside each other"
            raise ApiError(400, message, code="invalid_json") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if not is_utf8(body):
                raise ApiError(400, "the body is not UTF-8", code="invalid_json") from None
            if (field := non_finite_field(body)) is not None:
                raise ApiError(400, f"{field}: NaN and Infinity are not numbers that JSON has", param=field) from None
            message = str(error).removeprefix("JSON is malformed: ")
            raise ApiError(400, f"the body is not JSON: {message}", code="invalid_json") from None


def is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def deeper(value: Any, limit: int) -> bool:
    """Are more than `limit` arrays and objects inside each other?"""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(limit):
        inner = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in inner if isinstance(item, (dict, list))]
    return bool(level)


def non_finite_field(body: bytes) -> str | None:
    """The first field whose value holds NaN or an infinity, of a body that Python's lenient parser accepts."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return None
    for name, value in parsed.items() if isinstance(parsed, dict) else ():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if any(isinstance(item, float) and not math.isfinite(item) for item in values):
            return str(name)
    return None


class JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if request.method == "POST":
                content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
                if content_type != "application/json":
                    got = f"not {content_type[:100]!r}" if content_type else "and there is none"
                    raise ApiError(415, f"Content-Type must be application/json, {got}")
                encoding = request.headers.get("content-encoding", "identity").strip().lower()
                if encoding != "identity":
                    raise ApiError(415, f"a body with Content-Encoding {encoding[:100]!r} is not read; send it plain")
                request = JsonRequest(request.scope, request.receive)
            return await handler(request)

        return handle
