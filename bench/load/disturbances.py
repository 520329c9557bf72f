"""What is sent beside a stream, over and over, to see what one client does to another."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from bench.load.client import completion
from bench.load.scenarios import PATH

Requests = list[tuple[str, str, bytes]]  # method, path and body; written before anything is measured
MEGABYTE = "The quick brown fox jumps over the lazy dog, and then it rests in the sun. " * 14000
SCHEMAS = 100  # different ones, so that each is compiled
TOO_HARD = "start: A\nA: " + " & ".join(f"/.*a.{{{i}}}.*/" for i in range(3, 40))  # takes minutes


def hard_schema(number: int) -> dict[str, Any]:
    """Compiles in some 20 ms: 60 KB, 50 arrays of 90 values each."""
    values = [[f"{number} {i} {j}" for j in range(90)] for i in range(50)]
    fields = {f"field_{i}": {"type": "array", "items": {"enum": values[i]}, "maxItems": 50} for i in range(50)}
    return {"type": "object", "properties": fields, "required": ["field_0"], "additionalProperties": False}


def too_large() -> list[Requests]:
    return [[("POST", PATH, _bytes(completion(MEGABYTE, 1)))]]


def tokenised() -> list[Requests]:
    return [[("POST", "/tokenize", _bytes({"prompt": MEGABYTE}))]]


def grammars() -> list[Requests]:
    """One client sends schemas that compile, another a grammar that does not, so that it is ended at its limit."""
    formats = [
        {"type": "json_schema", "json_schema": {"name": "hard", "schema": hard_schema(i)}} for i in range(SCHEMAS)
    ]
    hard = [completion("x", 1, response_format=format, ignore_eos=False) for format in formats]
    endless = completion("x", 1, structured_outputs={"grammar": TOO_HARD}, ignore_eos=False)
    return [[("POST", PATH, _bytes(body)) for body in bodies] for bodies in (hard, [endless])]


def _bytes(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


DISTURBANCES: dict[str, Callable[[], list[Requests]]] = {  # each list of requests is one client's
    "1 MB prompts that cannot fit": too_large,
    "1 MB texts that are tokenised": tokenised,
    "hard schemas": grammars,
}
