"""`python -m server.api_page` writes docs/api.md: the description of /openapi.json as a page to read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from server.openapi import REF, Json

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"
BOUNDS = (  # (lowest, highest, what is counted)
    ("minimum", "maximum", ""),
    ("minLength", "maxLength", " characters"),
    ("minItems", "maxItems", " entries"),
    ("minProperties", "maxProperties", " entries"),
)


def page(spec: Json) -> str:
    """The whole page, from an OpenAPI document."""
    lines = [
        "# HTTP API",
        "",
        "<!-- Written by `python -m server.api_page`; do not edit it by hand. -->",
        "",
        spec["info"]["description"],
        "",
        "## Routes",
        "",
        "| route | body | reply | |",
        "|:--|:--|:--|:--|",
    ]
    for path, operations in spec["paths"].items():
        for method, operation in operations.items():
            lines.append(_row(f"`{method.upper()} {path}`", *_bodies(operation), operation.get("description", "")))
    some = next(iter(next(iter(spec["paths"].values())).values()))["responses"]
    lines += ["", "Every route may also answer with an [ErrorReply](#errorreply):", ""]
    lines += [f"- **{status}** {some[status]['description']}" for status in ("4XX", "5XX")]
    lines += ["", "| response header | |", "|:--|:--|"]
    headers = {name: header["description"] for reply in some.values() for name, header in reply["headers"].items()}
    lines += [_row(f"`{name}`", about) for name, about in headers.items()]
    lines += ["", "| API key | |", "|:--|:--|"]
    lines += [_row(f"`{name}`", _scheme(scheme)) for name, scheme in spec["components"]["securitySchemes"].items()]
    lines += ["", "## Objects", "", "In requests `null` stands for the default."]
    for name, schema in sorted(spec["components"]["schemas"].items(), key=lambda entry: entry[0].lower()):
        lines += ["", f"### {name}", "", *_object(schema)]
    return "\n".join(lines) + "\n"


def _scheme(scheme: Json) -> str:
    if scheme["type"] == "http":
        return f"`Authorization: {scheme['scheme'].title()} KEY`, {scheme['description']}"
    return f"`{scheme['name']}: KEY`"


def _bodies(operation: Json) -> tuple[str, str]:
    body = operation.get("requestBody", {"content": {}})["content"].get("application/json")
    content = operation["responses"]["200"]["content"]
    replies = []
    for media_type, entry in content.items():
        if media_type == "text/event-stream":
            payload = entry["itemSchema"]["properties"]["data"]["anyOf"][-1]["contentSchema"]
            replies.append("events: " + _kind(payload).removesuffix(f" or {_kind({'$ref': REF + 'ErrorReply'})}"))
        elif media_type == "application/json":
            replies.append(_kind(entry["schema"]))
        else:
            replies.append(media_type)
    return _kind(body["schema"]) if body else "", "; ".join(replies)


def _object(schema: Json) -> Iterator[str]:
    if "description" in schema:
        yield schema["description"].replace("\n", " ")
        yield ""
    is_request = schema.get("additionalProperties") is True
    yield "| field | type | default | |" if is_request else "| field | type | |"
    yield "|:--|:--|:--|:--|" if is_request else "|:--|:--|:--|"
    required = schema.get("required", ())
    for name, field in sorted(schema["properties"].items(), key=lambda entry: entry[0] not in required):
        kind, about = _kind(field), field.get("description", "")
        if is_request:
            default = "required" if name in required else _code(field["default"]).replace("`null`", "")
            yield _row(f"`{name}`", kind.removesuffix(" or null"), default, about)
        else:
            yield _row(f"`{name}`", kind, about if name in required else f"may be absent; {about}".removesuffix("; "))


def _kind(schema: Json) -> str:
    """A schema in words."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(REF)
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_kind(kind) for kind in schema["anyOf"])
    if "const" in schema:
        return _code(schema["const"])
    if "enum" in schema:
        return " or ".join(_code(value) for value in schema["enum"])
    kind = schema.get("type", "anything")
    if kind == "array":
        kind = f"list of {_kind(schema.get('items', {}))}"
    elif kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        kind = f"object of {_kind(schema['additionalProperties'])}"
    return ", ".join([kind, *_bounds(schema)])


def _bounds(schema: Json) -> Iterator[str]:
    if "exclusiveMinimum" in schema:
        yield f"above {schema['exclusiveMinimum']}"
    for low, high, unit in BOUNDS:
        if low in schema and high in schema:
            yield f"{schema[low]} to {schema[high]}{unit}"
        elif low in schema:
            yield f"at least {schema[low]}{unit}"
        elif high in schema:
            yield f"at most {schema[high]}{unit}"
    if "pattern" in schema:
        yield f"matching `{schema['pattern']}`"


def _code(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def _row(*cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


if __name__ == "__main__":
    from server.app import api  # which imports this module

    PAGE.write_text(page(api().openapi()), encoding="utf-8")
    print(f"wrote {PAGE}")
