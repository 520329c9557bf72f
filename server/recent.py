"""The last requests that finished, for the page's table and `GET /v1/live`: numbers only, no text of theirs."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server.generation import Generation

KEPT = 50


class Recent:
    """Newest first."""

    def __init__(self) -> None:
        self._requests: deque[dict[str, Any]] = deque(maxlen=KEPT)

    def add(self, generation: Generation) -> dict[str, Any]:
        """Of a reply that was admitted, however it ended; one without choices (a bad prompt) is left out.

        Returns the entry.
        """
        choices = generation.made
        if not choices:
            return {}
        reasons = [choice.finish_reason or "abort" for choice in choices]
        usage, timing = generation.usage(choices), generation.timing(choices) or {}
        cost = generation.cost(choices)
        entry = {
            "id": generation.id,
            "model": generation.asked.model or generation.service.model,
            "created": generation.created,
            "object": generation.shape.kind,
            "choices": len(choices),
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "finish_reason": next((r for r in reasons if r in ("error", "abort")), reasons[0]),
            "seconds": round(time.monotonic() - generation.arrival, 6),
            "time_to_first_token_ms": timing.get("time_to_first_token_ms"),
            "tokens_per_second": timing.get("tokens_per_second"),
            "cost": cost["cost"],
        }
        self._requests.appendleft(entry)
        return entry

    def list(self) -> list[dict[str, Any]]:
        return list(self._requests)
