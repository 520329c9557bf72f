"""What /openapi.json says, and docs/api.md with it: the models of server.protocol and server.replies, and a preface."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server import responses_body
from server.body import REFUSED, WITHOUT_EFFECT, Body
from server.keys import PUBLIC
from server.replies import ErrorReply, Reply

Json = dict[str, Any]
REF = "#/components/schemas/"
DESCRIPTION = f"""\
An OpenAI-compatible inference server. Where OpenAI's API is silent, names and meanings are vLLM's.

`null` means absent, on every field. Numbers are strict: `true` is not 1.0, `"2"` is not 2, and NaN and Infinity are
refused. Of a field that is given twice the last counts. A field that nobody knows is ignored and named in the response
header `x-ignored-params`.

Accepted without effect: {", ".join(f"`{name}`" for name in sorted(WITHOUT_EFFECT))}.

Refused by name, because they would change the answer and are not implemented (a value that changes nothing passes,
and so does a field that the body lists below):
{", ".join(f"`{name}`" for name in sorted(REFUSED))}; by /v1/responses, which keeps nothing between requests,
{", ".join(f"`{name}`" for name in sorted(responses_body.REFUSED))}.

Every error is `{{"error": {{"message", "type", "param", "code"}}}}`, with a 4xx or 5xx status wherever the reply
has not begun, else as the last event before `data: [DONE]`. HEAD works on every GET route.

A server with API keys wants one on every route but {", ".join(f"`GET {path}`" for path in sorted(PUBLIC))}."""
SECURITY: Json = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "as OpenAI's clients send it"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
}
ERRORS: dict[int | str, Json] = {
    "4XX": {
        "model": ErrorReply,
        "description": "The request is at fault: 400 a field, 401 the key, 404 model or route, 405 the method, "
        "408 a body that stopped coming, 413 one over 8 MiB, 415 its Content-Type or Content-Encoding, 421 its Host, "
        "429 a full queue, 431 too many headers.",
    },
    "5XX": {
        "model": ErrorReply,
        "description": "The server is: 503 while loading, draining or restarting, 504 after the time limit, else 500.",
    },
}


def reply_or_events(reply: type[BaseModel], *events: type[BaseModel], done: bool = True) -> dict[int | str, Json]:
    """`responses` of a route that answers with `reply` or, streaming, with events, each of them one of `events`.

    done: an error is an ErrorReply, and the last event is [DONE].
    """
    kinds = (*events, ErrorReply) if done else events
    payload: Json = {
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [{"$ref": REF + kind.__name__} for kind in kinds]},
    }
    data = {"type": "string", "anyOf": [*([{"const": "[DONE]"}] if done else []), payload]}
    item = {"type": "object", "properties": {"data": data, "event": {"type": "string"}}, "required": ["data"]}
    return {200: {"model": reply, "content": {"text/event-stream": {"itemSchema": item}}}}


def describe(app: FastAPI, wants_key: bool) -> None:
    """Make `app` answer /openapi.json with the bounds of integers exact, and events and headers described too."""

    def openapi() -> Json:
        if app.openapi_schema is None:
            spec = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
                tags=app.openapi_tags,
            )
            kinds = [(kind, "validation") for kind in leaves(Body)] + [
                (kind, "serialization") for kind in leaves(Reply)
            ]
            spec["components"]["schemas"] |= models_json_schema(kinds, ref_template=REF + "{model}")[1]["$defs"]
            for operations in spec["paths"].values():
                for operation in operations.values():
                    _add_headers(operation)
            spec["components"]["securitySchemes"] = SECURITY
            if wants_key:
                spec["security"] = [{name: []} for name in SECURITY]
                for path in PUBLIC & spec["paths"].keys():
                    spec["paths"][path]["get"]["security"] = []
            app.openapi_schema = spec
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign] (FastAPI's own way to extend it)


def leaves(base: type[BaseModel]) -> list[Any]:
    """The models below `base` that are not made only for others to be made from."""
    return [leaf for kind in base.__subclasses__() for leaf in (leaves(kind) if kind.__subclasses__() else [kind])]


def _add_headers(operation: Json) -> None:
    for status, response in operation["responses"].items():
        headers = {"x-request-id": ("yours, sanitised, or one made up", True)}
        if status == "200" and "requestBody" in operation:
            headers["x-ignored-params"] = ("fields of the body that nobody knows, separated by commas", False)
        if status in ("4XX", "5XX"):
            headers["retry-after"] = ("seconds; with 429 and 503", False)
        response["headers"] = {
            name: {"description": about, "schema": {"type": "string"}, "required": required}
            for name, (about, required) in headers.items()
        }
