"""Every error leaves as `{"error": {"message", "type", "param", "code"}}`: one sentence, no path, no traceback."""

from __future__ import annotations

import http
import logging
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from engine.errors import EngineDeadError, FenError, RequestError

log = logging.getLogger("fen.server")

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "internal_server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
WORDS = {  # for pydantic's, where they speak of Python
    "model_type": "must be a JSON object",
    "model_attributes_type": "must be a JSON object",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
}
MAX_DETAILS = 10
MAX_ECHO = 200  # characters of the caller's input that a message repeats,
ECHO_EACH = 80  # and of each value


class ApiError(HTTPException):
    """An HTTP error with OpenAI's body. `retry_after`: seconds, for 429 and 503."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        headers = None if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, message, headers)
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status_code, "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}


def as_api_error(error: BaseException) -> ApiError:
    """What a caller is told about any exception. Those not written for users become a bare 500 and are logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param, code=error.code)
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), code="engine_restarting", retry_after=2)
    if isinstance(error, FenError):
        return ApiError(500, str(error))
    if isinstance(error, RequestValidationError):
        return _from_validation(error.errors())
    if isinstance(error, HTTPException):
        return _from_http(error)
    log.error("request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why")


def _from_http(error: HTTPException) -> ApiError:
    messages = {
        404: "there is no such route; GET /openapi.json lists them",
        405: "this route does not take that method",
        413: "the body is larger than 8 MiB",
    }
    detail = messages.get(error.status_code) or error.detail or http.HTTPStatus(error.status_code).phrase
    result = ApiError(error.status_code, detail)
    result.headers = error.headers
    return result


def _from_validation(errors: Sequence[Any]) -> ApiError:
    details, first, left = [], None, MAX_ECHO
    for entry in errors[:MAX_DETAILS]:
        param = param_of(entry["loc"])
        first = first or param
        message = WORDS.get(entry["type"]) or entry["msg"][:1].lower() + entry["msg"][1:]
        if entry["type"] == "missing":
            details.append(f"{param}: this field is required" if param else "the body is empty; send a JSON object")
        elif entry["type"].startswith("fen"):  # our own validators already say what they got
            details.append(f"{param}: {message}")
        else:
            shown = echo(entry.get("input"), min(left, ECHO_EACH))
            details.append(f"{param or 'body'}: {message}" + (f", not {shown}" if left else ""))
            left = max(left - len(shown), 0)
    if len(errors) > MAX_DETAILS:
        details.append(f"and {len(errors) - MAX_DETAILS} more")
    return ApiError(400, "; ".join(details), param=first)


def param_of(location: Sequence[Any]) -> str | None:
    """("body", "messages", 0, "role") -> "messages[0].role"."""
    name = ""
    for part in location[1:]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name or None


def echo(value: Any, most: int = ECHO_EACH) -> str:
    """A short JSON rendering of the caller's input, of at most so many characters and an ellipsis."""
    text = msgspec.json.encode(value).decode() if not isinstance(value, (bytes, bytearray)) else repr(bytes(value))
    return text if len(text) <= most else text[:most] + "…"


def error_response(error: BaseException) -> Response:
    reply = as_api_error(error)
    return Response(msgspec.json.encode(reply.body()), reply.status_code, reply.headers, media_type="application/json")


def install(app: FastAPI) -> None:
    """Route the exceptions of `app` through `as_api_error`; server.middleware does so for those nobody expected."""

    async def handle(_request: Request, error: Exception) -> Response:
        return error_response(error)

    for kind in (HTTPException, RequestValidationError, FenError):
        app.add_exception_handler(kind, handle)
