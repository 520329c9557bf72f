"""Structured output: the request fields that constrain an answer, and the grammar that each of them means."""

from __future__ import annotations

import json
from typing import Any, Literal, NamedTuple

import msgspec
from pydantic import Field

from engine.errors import RequestError
from server.body import Body

MAX_SCHEMA_BYTES = 64 * 2**10
MAX_GRAMMAR_BYTES = 256 * 2**10  # of all the tools of a request together
COMPACT = {"whitespace_flexible": False}


class Structure(NamedTuple):
    """What an answer must look like. kind: "json" (a schema), "regex", "choice" (a JSON list of strings), "grammar"
    (Lark or GBNF) or "lark". param: the request field that it comes from."""

    kind: str
    text: str
    param: str


class JsonSchema(Body):
    name: str | None = Field(None, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field({}, alias="schema", description="at most 64 KiB")
    strict: bool | None = Field(None, description="the schema is followed in any case")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(None, description="with type json_schema")

    def structure(self) -> Structure | None:
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Structure("json", '{"type":"object"}', "response_format")
        if self.json_schema is None:
            raise RequestError("response_format.json_schema: this field is required", "response_format.json_schema")
        return json_structure(self.json_schema.schema_, "response_format.json_schema.schema")


class StructuredOutputs(Body):
    """Exactly one of its fields."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="a JSON schema, of at most 64 KiB")
    regex: str | None = Field(None, min_length=1)
    choice: list[str] | None = Field(None, min_length=1, max_length=1024)
    grammar: str | None = Field(None, min_length=1, description="in Lark's or llama.cpp's form")

    def structure(self) -> Structure:
        given = [name for name in ("json_", "regex", "choice", "grammar") if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError("structured_outputs: give one of json, regex, choice and grammar", "structured_outputs")
        name, value = given[0].rstrip("_"), getattr(self, given[0])
        param = f"structured_outputs.{name}"
        if name == "json":
            if isinstance(value, str):
                try:
                    value = msgspec.json.decode(value, type=dict[str, Any])
                except (msgspec.DecodeError, RecursionError):
                    raise RequestError(f"{param}: the string is not a JSON object", param) from None
            return json_structure(value, param)
        return bounded(Structure(name, json.dumps(value) if name == "choice" else value, param))


def json_structure(schema: dict[str, Any], param: str) -> Structure:
    return bounded(Structure("json", msgspec.json.encode(schema).decode(), param))


def bounded(structure: Structure, limit: int = MAX_SCHEMA_BYTES) -> Structure:
    """Raises RequestError when it is too large to be looked at."""
    size = len(structure.text.encode(errors="replace"))
    if size > limit:
        raise RequestError(
            f"{structure.param} has {size} bytes; at most {limit} are allowed", structure.param, "schema_too_large"
        )
    return structure


def grammar_of(kind: str, text: str) -> str:
    """As llguidance reads it. Raises ValueError for what is none; JSON is compact, the order of keys the schema's."""
    from llguidance import LLMatcher, regex_to_lark

    if kind == "json":
        return LLMatcher.grammar_from_json_schema(text, overrides=COMPACT)  # type: ignore[arg-type]
    if kind == "regex":  # the whole answer is matched, so anchors add nothing
        text = text.removeprefix("^")
        anchored = text.endswith("$") and (len(text) - len(text.rstrip("$\\"))) % 2 == 1
        lark = regex_to_lark(text[:-1] if anchored else text, "dw")  # \d and \w are ASCII, as in JSON schemas
        return LLMatcher.grammar_from_lark(f"start: /{lark}/")
    if kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(literal, json.loads(text))))
    return LLMatcher.grammar_from_lark(lark_of(text) if kind == "grammar" else text)


def lark_of(text: str) -> str:
    """A grammar in Lark's form, of one in that or llama.cpp's. Raises ValueError."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(text)
    except MemoryError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # it raises no kind of its own for an unknown rule
        raise ValueError(str(error)) from None


def literal(text: str) -> str:
    """A string of Lark's."""
    return json.dumps(text, ensure_ascii=False)
