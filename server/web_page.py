"""The page at `/` and the one reply that its tiles live on. The files are in server/page/, hand-written and sent as
they are; nothing inline and nothing from elsewhere, so that `Content-Security-Policy: default-src 'self'` holds."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.errors import ApiError
from server.replies import Live
from server.service import Service
from server.status import cost, load

router = APIRouter()
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


@functools.cache
def files() -> dict[str, tuple[bytes, str, str]]:
    """name -> (content, media type, ETag) of all that may be fetched."""
    found = {}
    for file in importlib.resources.files("server").joinpath("page").iterdir():
        media_type = TYPES.get(file.name.rpartition(".")[2])
        if media_type is not None:
            content = file.read_bytes()
            found[file.name] = content, media_type, f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    return found


@router.get("/", include_in_schema=False)
async def index(request: Request) -> Response:
    return file_response(request, "index.html")


@router.get("/favicon.ico", include_in_schema=False)
async def icon(request: Request) -> Response:
    return file_response(request, "icon.svg")  # browsers ask for it on every other route that a person opens


@router.get("/page/{name}", include_in_schema=False)
async def page_file(name: str, request: Request) -> Response:
    return file_response(request, name)


def file_response(request: Request, name: str) -> Response:
    if name not in files():
        raise ApiError(404, "there is no such route; GET /openapi.json lists them")
    content, media_type, tag = files()[name]
    headers = {"ETag": tag, "Cache-Control": "no-cache"}  # asked for each time, sent only when it has changed
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)


@router.get("/v1/live", response_model=Live)
async def live(request: Request) -> dict[str, Any]:
    """All that the page at `/` shows of a running server, in one reply."""
    service: Service = request.app.state.service
    stats, info = service.client.stats, service.client.info
    ready, reason = True, None
    try:
        service.check_ready()
    except ApiError as error:
        ready, reason = False, error.detail
    try:
        costs = await cost(request)
    except ApiError:
        costs = None  # before the engine's first word
    return {
        "object": "live",
        "time": time.monotonic(),
        "ready": ready,
        "reason": reason,
        "model": service.model,
        "max_model_len": info.max_model_len if info else None,
        "load": await load(request),
        "tokens": {"prompt": stats.prompt_tokens, "generation": stats.generation_tokens},
        "cost": costs,
        "requests": service.recent.list(),
    }
