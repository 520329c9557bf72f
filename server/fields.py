"""Field types of the request bodies that need words of their own when they are wrong."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_PROMPTS = 128
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_BIASES = 1024
TEXT_PARTS = ("text", "input_text", "output_text")  # of chat completions; of responses

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


def wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("fen", message)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int}


def _prompts(value: Any) -> list[str | list[int]]:
    """-> one entry per prompt, text or token ids."""
    if isinstance(value, str):
        prompts: list[Any] = [value]
    elif _is_ids(value):
        prompts = [value]
    elif isinstance(value, list) and value and all(isinstance(item, str) or _is_ids(item) for item in value):
        prompts = value
    else:
        raise wrong("must be a string, a list of strings, a list of token ids or a list of token-id lists; none empty")
    if len(prompts) > MAX_PROMPTS:
        raise wrong(f"at most {MAX_PROMPTS} prompts in one request, not {len(prompts)}")
    for prompt in prompts:
        if not prompt:
            raise wrong("a prompt must not be empty")
        if not isinstance(prompt, str) and min(prompt) < 0:
            raise wrong(f"token id {min(prompt)} is negative")
    return prompts


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise wrong("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise wrong(f"at most {MAX_STOPS} stop strings, not {len(stops)}")
    if not all(1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise wrong(f"each stop string must have 1 to {MAX_STOP_CHARACTERS} characters")
    return stops


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise wrong("must be an object of token id to bias")
    if len(value) > MAX_BIASES:
        raise wrong(f"at most {MAX_BIASES} entries, not {len(value)}")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise wrong(f"keys must be token ids in decimal digits, not {key[:40]!r}")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise wrong(f"the bias of token {key} must be a number from -100 to 100")
        biases[int(key)] = float(bias)
    return biases


def _content(value: Any) -> str:
    """Text, or a list of text parts, which are joined by a line feed."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise wrong("must be a string or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(kind, str) and kind not in TEXT_PARTS:
            raise wrong(f"this model reads text only; a part of type {kind[:40]!r} is not supported")
        else:
            raise wrong('each part must be {"type": "text", "text": "..."}')
    return "\n".join(texts)


_TEXT = {"type": "string", "minLength": 1}
_STOP = _TEXT | {"maxLength": MAX_STOP_CHARACTERS}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}

Prompt = Annotated[
    list[Any],
    PlainValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_PROMPTS},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
            ]
        }
    ),
]
Stop = Annotated[
    list[str],
    PlainValidator(_stops),
    WithJsonSchema(
        {
            "anyOf": [
                _STOP,
                {"type": "array", "items": _STOP, "maxItems": MAX_STOPS},
            ]
        }
    ),
]
LogitBias = Annotated[
    dict[int, float],
    PlainValidator(_biases),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_BIASES,
        }
    ),
]
ContentText = Annotated[
    str,
    PlainValidator(_content),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                    },
                },
            ]
        }
    ),
]
