"""What the server answers: one pydantic model per reply and per event of a stream.

They are strict (no field that is not written down here): /openapi.json and docs/api.md are made from them, and tests
hold the replies of a live server against them. A field without a default is always there, perhaps null; one with a
default may be absent.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]
STOP_REASON = "the stop string or stop token id that ended it; null for the model's own end"


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Reply):
    message: str = Field(description="one sentence for a person: what is wrong, what is allowed")
    type: str
    param: str | None = Field(description="the field at fault, such as `messages[0].role`")
    code: str | None = Field(description="for programs, such as `context_length_exceeded`, `model_not_found`")


class ErrorReply(Reply):
    """The body of every 4xx and 5xx reply, and the event that ends a stream which fails."""

    error: ErrorDetail


# What all generated replies have


class PromptTokensDetails(Reply):
    cached_tokens: int = Field(description="prompt tokens whose KV came from the prefix cache")


class DevicePrice(Reply):
    usd_per_device_hour: float
    name: str
    date: str
    source: str


class DeviceSeconds(Reply):
    """What the reply is charged with, by class of the ledger (docs/cost.md)."""

    prompt: float
    cached_prompt: float
    decode: float
    recompute: float


class CostDetails(Reply):
    input_usd: float | None
    cached_usd: float | None
    output_usd: float | None
    basis: Literal["direct"]
    device_seconds: DeviceSeconds | None
    price: DevicePrice | None
    reason: str | None = Field(description="why an amount is null")


class Usage(Reply):
    prompt_tokens: int = Field(description="each prompt counts once, however many choices it has")
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    cost: float | None = Field(description="US$; null without a price, and before the reply is complete")
    cost_details: CostDetails | None = Field(description="null before the reply is complete")


class RequestMetrics(Reply):
    """Times of this request, under vLLM's names."""

    time_to_first_token_ms: float
    queue_time_ms: float
    mean_itl_ms: float | None = Field(description="between two tokens; null for one token")
    tokens_per_second: float


class Generated(Reply):
    id: str = Field(description="constant over a stream")
    created: int = Field(description="seconds since 1970")
    model: str


class Whole(Generated):
    usage: Usage
    metrics: RequestMetrics | None = Field(description="null when it ended before its first token")


class Chunk(Generated):
    usage: Usage | None = Field(
        None, description="with stream_options.include_usage: null until the last chunk, whose `choices` are empty"
    )
    metrics: RequestMetrics | None = Field(None, description="beside the usage of the last chunk")


# POST /v1/completions


class CompletionLogprobs(Reply):
    """Parallel lists, one entry per token. The first token of a prompt has no logprob: null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="where the token begins in the text, in characters")


class CompletionChoice(Reply):
    index: int = Field(description="choice i of prompt p is p·n + i")
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None = Field(description="null in a stream until the choice's last chunk")
    stop_reason: str | int | None = Field(description=STOP_REASON)


class Completion(Whole):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class CompletionChunk(Chunk):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


# POST /v1/chat/completions


class TokenAlternative(Reply):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TokenAlternative):
    top_logprobs: list[TokenAlternative]


class ChatLogprobs(Reply):
    content: list[TokenLogprob] | None
    refusal: None


class FunctionCall(Reply):
    name: str
    arguments: str = Field(description="JSON as the model wrote it")


class ToolCall(Reply):
    id: str
    type: Literal["function"]
    function: FunctionCall


class FunctionCallDelta(Reply):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Reply):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta


class ChatMessage(Reply):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatDelta(Reply):
    role: Literal["assistant"] | None = Field(None, description="in the first chunk of a choice")
    content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChoice(Reply):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None = Field(description=STOP_REASON)


class ChatChunkChoice(Reply):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = Field(None, description=STOP_REASON + "; in the choice's last chunk")


class ChatCompletion(Whole):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ChatCompletionChunk(Chunk):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


# Text


class Tokenized(Reply):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(description="with return_token_strs")


class Detokenized(Reply):
    prompt: str


class TokenizerInfo(Reply):
    tokenizer_class: str
    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None


# What is served, how it is doing


class ModelCard(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None = Field(description="tokens of prompt and answer together; null while loading")


class ModelList(Reply):
    object: Literal["list"]
    data: list[ModelCard]


class Health(Reply):
    status: Literal["ok"]


class Ready(Reply):
    status: Literal["ready"]


class Version(Reply):
    version: str


class Load(Reply):
    server_load: int = Field(description="completions accepted and not yet answered")
    engine: str = Field(description="loading, idle, busy, compiling or capturing, as of its last heartbeat")
    running: int
    waiting: int
    kv_cache_usage: float = Field(description="0 to 1")
    kv_blocks_used: int
    kv_blocks_total: int


class Energy(Reply):
    joules: float | None = Field(description="by the device's own counter")
    reason: str | None = Field(description="why there is no figure")


class Cost(Reply):
    """docs/cost.md defines every term."""

    object: Literal["cost"]
    model: str
    quantization: str | None
    device: str | None
    notes: list[str]
    devices: int
    wall_seconds: float
    device_seconds: dict[str, float] = Field(description="by class of the ledger")
    unaccounted_seconds: float
    utilisation: float | None
    tokens: dict[str, int] = Field(description="of finished requests")
    price: DevicePrice | None
    reason: str | None = Field(description="why there is no price")
    usd: dict[str, float] | None = Field(description="what the bill was for")
    usd_per_million_tokens: dict[str, dict[str, float | None]] | None = Field(description="by basis, then by phase")
    energy: Energy


class RecentRequest(Reply):
    """A request that has ended. Numbers only: its text is nowhere kept."""

    id: str
    model: str = Field(description="the name that was asked for")
    created: int = Field(description="seconds since 1970")
    object: Literal["chat.completion", "text_completion"]
    choices: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: FinishReason = Field(description="of several choices: `error` or `abort` if one ended so")
    seconds: float = Field(description="from its arrival to the end of its reply")
    time_to_first_token_ms: float | None = Field(description="null without a token")
    tokens_per_second: float | None
    cost: float | None = Field(description="US$, direct basis; null without a price, and of one that was ended early")


class LiveTokens(Reply):
    prompt: int
    generation: int


class Live(Reply):
    """What the page at `/` shows. The tokens of two replies over the difference of their times are a speed."""

    object: Literal["live"]
    time: float = Field(description="seconds of a clock that only goes forward")
    ready: bool
    reason: str | None = Field(description="why it is not ready")
    model: str
    max_model_len: int | None
    load: Load
    tokens: LiveTokens = Field(description="since the engine's start")
    cost: Cost | None = Field(description="null before the engine has said anything")
    requests: list[RecentRequest] = Field(description="the last 50, newest first")
