"""What POST /v1/responses answers: the reply, its output items, and the events of a stream."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from server.replies import CostDetails, Reply, RequestMetrics, TokenLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(Reply):
    type: Literal["output_text"]
    text: str
    annotations: list[Any] = Field(description="always empty")
    logprobs: list[TokenLogprob]


class OutputMessage(Reply):
    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class OutputCall(Reply):
    type: Literal["function_call"]
    id: str
    call_id: str = Field(description="what the function_call_output that answers it must name")
    name: str
    arguments: str = Field(description="JSON as the model wrote it")
    status: ItemStatus


class InputTokensDetails(Reply):
    cached_tokens: int


class OutputTokensDetails(Reply):
    reasoning_tokens: int = Field(description="always 0")


class ResponseUsage(Reply):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    cost: float | None = Field(description="US$; null without a price")
    cost_details: CostDetails


class ResponseError(Reply):
    code: str
    message: str


class IncompleteDetails(Reply):
    reason: Literal["max_output_tokens"]


class ModelResponse(Reply):
    id: str
    object: Literal["response"]
    created_at: int = Field(description="seconds since 1970")
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None = Field(description="with status failed")
    incomplete_details: IncompleteDetails | None = Field(description="with status incomplete")
    model: str
    output: list[OutputMessage | OutputCall]
    usage: ResponseUsage | None = Field(description="null until it has ended")
    metrics: RequestMetrics | None
    # What was asked, as it was understood
    instructions: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    top_logprobs: int
    text: dict[str, Any]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    truncation: Literal["disabled"]
    # Nothing is kept between requests
    background: Literal[False]
    previous_response_id: None
    store: Literal[False]


# Events


class ResponseEvent(Reply):
    sequence_number: int = Field(description="0, 1, 2, …")


class ResponseState(ResponseEvent):
    """The beginning and the end of a stream: the response so far."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ModelResponse


class OutputItemEvent(ResponseEvent):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputMessage | OutputCall


class ContentPartEvent(ResponseEvent):
    type: Literal["response.content_part.added", "response.content_part.done"]
    item_id: str
    output_index: int
    content_index: int
    part: OutputText


class OutputTextDelta(ResponseEvent):
    type: Literal["response.output_text.delta"]
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[TokenLogprob]


class OutputTextDone(ResponseEvent):
    type: Literal["response.output_text.done"]
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[TokenLogprob]


class CallArgumentsDelta(ResponseEvent):
    type: Literal["response.function_call_arguments.delta"]
    item_id: str
    output_index: int
    delta: str


class CallArgumentsDone(ResponseEvent):
    type: Literal["response.function_call_arguments.done"]
    item_id: str
    output_index: int
    name: str
    arguments: str


EVENTS = (
    ResponseState,
    OutputItemEvent,
    ContentPartEvent,
    OutputTextDelta,
    OutputTextDone,
    CallArgumentsDelta,
    CallArgumentsDone,
)
