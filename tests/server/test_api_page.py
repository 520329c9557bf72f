"""/openapi.json and docs/api.md: they say what the models of server.protocol and server.replies say."""

from __future__ import annotations

from typing import Any

import pytest

from server.api_page import PAGE, page
from server.app import api
from server.body import REFUSED
from server.openapi import REF
from server.protocol import ChatCompletionRequest, CompletionRequest

SPEC = api().openapi()


def test_the_page_is_not_stale() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(SPEC), "run: python -m server.api_page"


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*(references(item) for item in value.values()))
    return set().union(*(references(item) for item in value)) if isinstance(value, list) else set()


def test_every_route_describes_its_reply_and_nothing_is_left_over() -> None:
    for path, operations in SPEC["paths"].items():
        for operation in operations.values():
            assert operation["description"], path
            for status in ("200", "4XX", "5XX"):
                reply = operation["responses"][status]
                assert reply["headers"]["x-request-id"]["required"]
                content = reply["content"]
                assert "text/plain" in content or references(content["application/json"]), path
    known = {REF + name for name in SPEC["components"]["schemas"]}
    assert references(SPEC) == known


def test_requests_allow_other_fields_and_replies_do_not() -> None:
    schemas = SPEC["components"]["schemas"]
    operations = [operation for path in SPEC["paths"].values() for operation in path.values()]
    requests = found = references([operation.get("requestBody") for operation in operations])
    while found:
        found = references([schemas[name.removeprefix(REF)] for name in found]) - requests
        requests |= found
    assert len(requests) > 6
    for name, schema in schemas.items():
        assert schema["additionalProperties"] is (REF + name in requests), name


@pytest.mark.parametrize("model", [CompletionRequest, ChatCompletionRequest])
def test_optional_fields_may_be_null_and_bounds_are_exact(model: Any) -> None:
    schema = SPEC["components"]["schemas"][model.__name__]
    for name, field in schema["properties"].items():
        assert ({"type": "null"} in field.get("anyOf", ())) is (name not in schema["required"])
    temperature = schema["properties"]["temperature"]["anyOf"][0]
    assert (temperature["minimum"], temperature["maximum"]) == (0, 2)
    seed = schema["properties"]["seed"]["anyOf"][0]
    assert (seed["minimum"], seed["maximum"]) == (-(2**63), 2**63 - 1) and type(seed["maximum"]) is int


def test_what_is_refused_is_named() -> None:
    assert all(f"`{name}`" in SPEC["info"]["description"] for name in REFUSED)
