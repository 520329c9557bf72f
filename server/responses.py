"""POST /v1/responses, stateless: a chat completion in the words of OpenAI's newer API."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.detokenizer import TextDelta
from engine.errors import RequestError
from server.chat import ChatShape
from server.choice import Choice
from server.errors import as_api_error
from server.generation import LAST_EVENT_SECONDS, Generation, Json, encode_json
from server.json_route import JsonRoute
from server.openapi import reply_or_events
from server.responses_body import ResponsesRequest, TextFormat, in_our_names
from server.responses_output import Output
from server.responses_replies import EVENTS, ModelResponse
from server.service import Service

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/responses", operation_id="create_response", responses=reply_or_events(ModelResponse, *EVENTS, done=False)
)
@router.post("/responses", include_in_schema=False)
async def create_response(body: ResponsesRequest, request: Request) -> Response:
    """Answer an input, which carries the whole conversation: nothing is stored. A stream has no [DONE]."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    return ResponsesGeneration(service, body)


class ResponsesGeneration(Generation):
    def __init__(self, service: Service, body: ResponsesRequest):
        chat = body.chat()
        self.words = ChatShape(service, chat)
        super().__init__(service, chat, self.words, 1)
        self.headers.update(body.ignored_header())
        self.body = body
        self.id = f"resp_{self.id.removeprefix(self.words.prefix)}"
        self.output = Output()
        self.numbered = 0  # events sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except RequestError as error:
            raise in_our_names(error) from None

    def whole(self, choices: list[Choice], deltas: list[list[TextDelta]]) -> Json:
        (choice,) = choices
        said = self.words.whole(choice, deltas[0])
        self.output.add(said["message"], _tokens(said))
        return self.ended(choice)[-1]["response"]

    async def run_stream(self) -> None:
        try:
            async with self.time_limit():
                (choice,) = await self.choices()
                await self.run_choices([choice], self.send_delta)
            await self.send_events(self.ended(choice))
        except Exception as error:
            if not self.begun:
                raise
            detail = as_api_error(error).body()["error"]
            failure = {"code": detail["code"] or "server_error", "message": detail["message"]}
            events = self.output.finish("incomplete")
            events.append({"type": "response.failed", "response": self.response("failed", failure)})
            async with asyncio.timeout(LAST_EVENT_SECONDS):  # the client may be one that reads no more
                await self.send_events(events)
        await self.send({"type": "http.response.body", "body": b""})

    async def send_delta(self, choice: Choice, delta: TextDelta) -> None:
        if not choice.opened:
            choice.opened = True
            begun = self.response("in_progress")
            await self.send_events(
                [{"type": f"response.{kind}", "response": begun} for kind in ("created", "in_progress")]
            )
        if (chunk := self.words.chunk(choice, delta)) is not None:
            await self.send_events(self.output.add(chunk["delta"], _tokens(chunk)))

    async def send_events(self, events: list[Json]) -> None:
        data = b""
        for event in events:
            event["sequence_number"] = self.numbered
            self.numbered += 1
            data += b"event: " + event["type"].encode() + b"\ndata: " + encode_json(event) + b"\n\n"
        if data:
            await self.write(data)

    # The response object

    def ended(self, choice: Choice) -> list[Json]:
        """The last events; the very last one has the whole response."""
        status = {"stop": "completed", "length": "incomplete"}.get(choice.finish_reason or "", "failed")
        failure = {"code": "server_error", "message": "the reply was ended early"} if status == "failed" else None
        events = self.output.finish("completed" if status == "completed" else "incomplete")
        response = self.response(status, failure, choice)
        return [*events, {"type": f"response.{status}", "response": response}]

    def response(self, status: str, failure: Json | None = None, ended: Choice | None = None) -> Json:
        """`ended`: then there are usage and metrics."""
        body = self.body
        text = (body.text and body.text.format) or TextFormat(type="text")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": failure,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.asked.model or self.service.model,
            "output": self.output.items,
            "usage": ended and self.response_usage(ended),
            "metrics": ended and self.timing([ended]),
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_logprobs": body.top_logprobs or 0,
            "text": {"format": text.model_dump(by_alias=True, exclude_none=True)},
            "tools": [tool.model_dump() for tool in body.tools],
            "tool_choice": body.tool_choice or "auto",
            "parallel_tool_calls": body.parallel_tool_calls,
            "truncation": body.truncation,
            "background": False,
            "previous_response_id": None,
            "store": False,
        }

    def response_usage(self, choice: Choice) -> Json:
        usage = self.usage([choice])
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
            **self.cost([choice]),
        }


def _tokens(said: Json) -> list[Json]:
    """The logprobs of a chat's choice or chunk."""
    return (said["logprobs"] or {}).get("content") or []
