"""Loaded by the schemathesis command (tests/clients/test_schemathesis.py): keeps valid requests valid, and short."""

from __future__ import annotations

from typing import Any

import schemathesis
from schemathesis import GenerationMode, HookContext

MAX_TOKENS = 4  # the model is real, and the test is not about its text
LENGTHS = {
    "/v1/completions": ["max_tokens"],
    "/v1/chat/completions": ["max_tokens", "max_completion_tokens"],
    "/v1/responses": ["max_output_tokens"],
}


@schemathesis.hook
def before_call(context: HookContext, case: Any, kwargs: dict[str, Any]) -> None:
    body = case.body
    if not isinstance(body, dict) or case.meta is None or case.meta.generation.mode is not GenerationMode.POSITIVE:
        return
    for name in ("model", "best_of", "min_tokens"):  # a made-up one makes little but errors
        body.pop(name, None)
    if "top_logprobs" in body:
        body["logprobs"] = True
    if "stream_options" in body:
        body["stream"] = True
    for name in LENGTHS.get(case.path, ()):
        body[name] = min(body.get(name) or MAX_TOKENS, MAX_TOKENS)
