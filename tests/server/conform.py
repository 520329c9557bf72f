"""Holds replies against /openapi.json: the pydantic model that it names for the route must accept them."""

from __future__ import annotations

import re
from typing import Any, Union

import httpx
from pydantic import BaseModel, TypeAdapter

from server import replies
from server.app import api
from server.openapi import REF, leaves

PATHS = api().openapi()["paths"]
MODELS = {model.__name__: model for model in leaves(replies.Reply)}


def _described(path: str) -> dict[str, Any]:
    """The operations of a path; of one without /v1, those of the path with it."""
    for template, operations in PATHS.items():
        if re.fullmatch(re.sub(r"{\w+}", ".+", template), path) or template == f"/v1{path}":
            return operations
    return {}


def _models(schema: dict[str, Any]) -> list[type[BaseModel]]:
    return [MODELS[kind["$ref"].removeprefix(REF)] for kind in schema.get("anyOf", [schema])]


def check_reply(response: httpx.Response) -> None:
    """Every JSON reply; an httpx event hook. Raises pydantic's ValidationError with the field."""
    if response.headers.get("content-type") != "application/json" or response.request.method == "HEAD":
        return
    response.read()
    if response.status_code >= 400:
        replies.ErrorReply.model_validate_json(response.content, strict=True)
    elif operation := _described(response.request.url.path).get(response.request.method.lower()):
        (model,) = _models(operation["responses"]["200"]["content"]["application/json"]["schema"])
        model.model_validate_json(response.content, strict=True)


def check_event(path: str, event: dict[str, Any]) -> None:
    """One event of a streamed reply."""
    item = _described(path)["post"]["responses"]["200"]["content"]["text/event-stream"]["itemSchema"]
    kinds: Any = _models(item["properties"]["data"]["anyOf"][-1]["contentSchema"])
    TypeAdapter(Union[tuple(kinds)]).validate_python(event, strict=True)  # noqa: UP007 (as many as there are)
