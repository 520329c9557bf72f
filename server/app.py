"""The FastAPI application. Imports no torch: the engine runs in a process of its own."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from engine.checkpoint.tokenizer import Tokenizer
from engine.core.client import EngineClient
from engine.errors import FenError
from server import chat, completions, docs_route, errors, openapi, responses, status, text_routes, web_page
from server.host_check import HostCheck, host_names
from server.keys import ApiKeys, KeyCheck
from server.middleware import Envelope
from server.service import Service
from server.settings import ServerSettings
from server.version import version

ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+")


def api(
    lifespan: Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]] | None = None, wants_key: bool = False
) -> FastAPI:
    """All routes and their description (FastAPI.openapi), without the service that they need to answer. wants_key: in
    the description; server.keys asks for it."""
    app = FastAPI(
        title="Fen",
        version=version(),
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's own are fetched from elsewhere; server.docs_route
        redoc_url=None,
        description=openapi.DESCRIPTION,
        responses=openapi.ERRORS,
    )
    for router in (
        chat.router,
        completions.router,
        responses.router,
        text_routes.router,
        status.router,
        docs_route.router,
        web_page.router,
    ):
        app.include_router(router)
    errors.install(app)
    openapi.describe(app, wants_key)
    return app


def create_app(
    client: EngineClient,
    tokenizer: Tokenizer,
    settings: ServerSettings,
    *,
    chat_template: str | None,
    model: str,
    start: Callable[[], Coroutine[Any, Any, object]] | None = None,
    keys: Sequence[str] = (),
    loopback: bool = False,
) -> FastAPI:
    """`model`: the name to serve under unless the settings give one. `start`: run in the background once the port is
    open; default: `client.start`. The engine stops with the app. `keys`: of which callers need one; none: open to all.
    `loopback`: only this machine can connect, so that without keys its browsers are what has to be kept out.
    """
    service = Service(client, tokenizer, chat_template, settings, model, ApiKeys(keys))

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with service.running(start or client.start):
            yield

    app = api(lifespan, wants_key=bool(keys))
    app.state.service = service
    app.add_middleware(KeyCheck, keys=service.keys)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[web_origin(origin) for origin in settings.cors_origins],
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-ignored-params", "retry-after"],
        )
    names = host_names(settings.allowed_hosts) | {settings.host.lower()}
    if settings.allowed_hosts or (loopback and not keys):
        app.add_middleware(HostCheck, names=names)
    app.add_middleware(Envelope, done=service.answered)
    return app


def web_origin(given: str) -> str:
    """As browsers send it. Raises FenError for what no browser sends, and so would allow nobody."""
    origin = given.lower()
    if not ORIGIN.fullmatch(origin):
        raise FenError(
            f"--cors-origins {given!r} is no web origin; give scheme, name and port without a path, such as "
            "https://app.example.org, or * for any"
        )
    return origin
