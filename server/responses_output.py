"""The output items of a response, built from the deltas of a chat message; every change is also an event."""

from __future__ import annotations

import uuid
from typing import Any

Json = dict[str, Any]


class Output:
    """`items` so far, the last one perhaps open. Each method returns the events that it makes, not yet numbered."""

    def __init__(self) -> None:
        self.items: list[Json] = []

    def add(self, delta: Json, logprobs: list[Json]) -> list[Json]:
        """`delta` as in a chunk of a chat completion: content, tool_calls."""
        events: list[Json] = []
        if delta.get("content") or (logprobs and not self.items):
            events += self._text(delta.get("content") or "", logprobs)
        for call in delta.get("tool_calls") or ():
            events += self._call(call)
        return events

    def finish(self, status: str) -> list[Json]:
        """Close the last item as "completed" or "incomplete"; an answer without any has an empty message."""
        opened = [] if self.items else self._open_message()
        return opened + self._close(status)

    def _text(self, text: str, logprobs: list[Json]) -> list[Json]:
        events: list[Json] = []
        if not self.items or self.items[-1]["type"] != "message":
            events += self._close("completed") + self._open_message()
        part = self.items[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        return [*events, self._event("output_text.delta", content_index=0, delta=text, logprobs=logprobs)]

    def _open_message(self) -> list[Json]:
        item = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "role": "assistant", "status": "in_progress"}
        self.items.append({**item, "content": []})
        added = self._item_event("added")
        part: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.items[-1]["content"] = [part]
        return [added, self._event("content_part.added", content_index=0, part={**part, "logprobs": []})]

    def _call(self, call: Json) -> list[Json]:
        """A delta of one call; the first has its id and name."""
        events: list[Json] = []
        function = call["function"]
        if call.get("id"):
            events += self._close("completed")
            item = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": call["id"]}
            self.items.append({**item, "name": function["name"], "arguments": "", "status": "in_progress"})
            events.append(self._item_event("added"))
        if arguments := function.get("arguments"):
            self.items[-1]["arguments"] += arguments
            events.append(self._event("function_call_arguments.delta", delta=arguments))
        return events

    def _close(self, status: str) -> list[Json]:
        if not self.items or self.items[-1]["status"] != "in_progress":
            return []
        item = self.items[-1]
        if item["type"] == "message":
            part = item["content"][0]
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            events = [
                self._event("output_text.done", content_index=0, **text),
                self._event("content_part.done", content_index=0, part=part),
            ]
        else:
            call = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._event("function_call_arguments.done", **call)]
        item["status"] = status
        return [*events, self._item_event("done")]

    def _event(self, kind: str, **fields: Any) -> Json:
        return {
            "type": f"response.{kind}",
            "item_id": self.items[-1]["id"],
            "output_index": len(self.items) - 1,
            **fields,
        }

    def _item_event(self, kind: str) -> Json:
        item = {**self.items[-1]}
        return {"type": f"response.output_item.{kind}", "output_index": len(self.items) - 1, "item": item}
