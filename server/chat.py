"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.detokenizer import TextDelta
from server.choice import Choice
from server.generation import Generation, Json
from server.json_route import JsonRoute
from server.logprobs import chat_logprobs
from server.openapi import reply_or_events
from server.protocol import ChatCompletionRequest
from server.replies import ChatCompletion, ChatCompletionChunk
from server.service import Service
from server.tool_parser import ToolParser, whole
from server.tools import HERMES

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/chat/completions",
    operation_id="create_chat_completion",
    responses=reply_or_events(ChatCompletion, ChatCompletionChunk),
)
@router.post("/chat/completions", include_in_schema=False)
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    """Answer a conversation, by the model's own chat template."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    return Generation(service, body, ChatShape(service, body), 1)


class ChatShape:
    """A message in a whole reply; in a stream first the role, then what is added to the content and the tool calls."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def __init__(self, service: Service, body: ChatCompletionRequest):
        self.service = service
        self.body = body
        self.parsers: dict[int, ToolParser] = {}  # by choice, where there are tools

    def opening(self, choice: Choice) -> Json | None:
        delta = {"role": "assistant", "content": None if self.body.offered else "", "refusal": None}
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, choice: Choice, delta: TextDelta) -> Json | None:
        logprobs, finish = self._logprobs([delta]), delta.finish_reason
        said: Json = {"content": delta.text} if delta.text else {}
        if self.body.offered:
            parser = self._parser(choice)
            said = parser.feed(delta.text, finish is not None)
            finish = "tool_calls" if finish == "stop" and parser.calls else finish
        if not said and logprobs is None and delta.finish_reason is None:
            return None
        chunk = {
            "index": choice.index,
            "delta": said,
            "logprobs": logprobs,
            "finish_reason": finish,
        }
        if delta.finish_reason is not None:
            chunk["stop_reason"] = delta.stop_reason
        return chunk

    def whole(self, choice: Choice, deltas: list[TextDelta]) -> Json:
        text, finish = "".join(delta.text for delta in deltas), choice.finish_reason
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if self.body.offered:
            parser = self._parser(choice)
            parser.feed(text, last=True)
            message["content"] = parser.content or None
            if parser.calls:
                message["tool_calls"] = [whole(call) for call in parser.calls]
                finish = "tool_calls" if finish == "stop" else finish
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(deltas),
            "finish_reason": finish,
            "stop_reason": choice.stop_reason,
        }

    def _parser(self, choice: Choice) -> ToolParser:
        return self.parsers.setdefault(choice.index, ToolParser(self.service.call_form or HERMES))

    def _logprobs(self, deltas: list[TextDelta]) -> Json | None:
        if not self.body.logprobs:
            return None
        entries = [entry for delta in deltas for entry in delta.logprobs or ()]
        return chat_logprobs(self.service.tokenizer, entries) if entries else None
