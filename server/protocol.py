"""The request bodies: one pydantic model each, strict, feeding validation and /openapi.json.

Names and meanings are OpenAI's; where it is silent, vLLM's. `null` means absent. A field that is known but not
implemented, and would change the answer, is refused by name; a field nobody knows is ignored and reported.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from engine.errors import RequestError
from engine.messages import SamplingParams
from server.body import REFUSED, Body
from server.fields import ContentText, LogitBias, Prompt, Stop, TokenId
from server.structured import ResponseFormat, Structure, StructuredOutputs
from server.tools import MAX_TOOLS, Tool, ToolCallMessage, ToolChoice, check_tools

MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20


class StreamOptions(Body):
    include_usage: bool = Field(False, description="a last chunk with the usage")
    continuous_usage_stats: bool = Field(False, description="usage so far, in every chunk")


class Sampling(Body):
    """How an answer is drawn and where it ends, whichever route asks for it."""

    model: str | None = Field(None, description="default: the model that is served")
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the most likely token")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the most likely tokens that together have this probability")
    top_k: int = Field(0, ge=-1, le=2**31 - 1, description="0 and -1 are off")
    min_p: float = Field(0.0, ge=0, le=1, description="drop tokens less likely than this share of the most likely one")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="off the logit of every token generated so far")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="the same, once for each time")
    repetition_penalty: float = Field(
        1.0, gt=0, le=10, description="divides logits above 0 of tokens seen, prompt included"
    )
    min_tokens: int = Field(0, ge=0, le=2**31 - 1, description="no end and no stop string before")
    stop: Stop = Field([], description="text that ends the reply")
    stop_token_ids: list[TokenId] = Field([], max_length=64, description="tokens that end it")
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="choice i draws from stream (seed, i)")
    stream: bool = False
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = Field(
        None, description="the prefix cache is shared between equal salts only"
    )
    request_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:-]{1,64}$")] | None = Field(
        None, description="becomes part of the reply's id"
    )
    priority: int = Field(0, ge=-(2**31), le=2**31 - 1, description="smaller is served first")


class GenerationBody(Sampling):
    """The fields that completions and chat completions share."""

    refused = REFUSED

    n: int = Field(1, ge=1, le=MAX_CHOICES, description="choices for each prompt")
    best_of: int | None = Field(None, description="only the value of n is accepted")
    logit_bias: LogitBias = Field({}, description="token id to what is added to its logit")
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = Field(None, description="JSON is compact, its keys in the schema's order")
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _agree(self) -> GenerationBody:
        if self.best_of is not None and self.best_of != self.n:
            raise RequestError(f"best_of must equal n ({self.n}): every choice is returned", "best_of")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed with stream: true", "stream_options")
        if self.structured_outputs is not None and self.response_format and self.response_format.type != "text":
            raise RequestError("structured_outputs is only allowed without response_format", "structured_outputs")
        self.structure()
        return self

    def structure(self) -> Structure | None:
        """What the answer's text must look like; None: anything."""
        if self.structured_outputs is not None:
            return self.structured_outputs.structure()
        return self.response_format.structure() if self.response_format is not None else None

    def limit(self) -> int | None:
        """The caller's bound on new tokens, None where none was given."""
        raise NotImplementedError

    def sampling(self, max_tokens: int, stream: int, vocab_size: int) -> SamplingParams:
        """Parameters of choice `stream`. Raises RequestError for token ids outside the vocabulary."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            if (worst := max(ids, default=0)) >= vocab_size:
                raise RequestError(f"{name}: token id {worst} is outside the vocabulary (0 to {vocab_size - 1})", name)
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k if 0 < self.top_k < vocab_size else 0,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stream=stream,
            logit_bias=self.logit_bias,
            logprobs=self.top(),
            prompt_logprobs=self.top_prompt(),
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
        )

    def top(self) -> int | None:
        """How many alternatives each token's logprob brings along; None: no logprobs."""
        raise NotImplementedError

    def top_prompt(self) -> int | None:
        """The same for the tokens of the prompt."""
        return None


class CompletionRequest(GenerationBody):
    prompt: Prompt
    max_tokens: int = Field(16, ge=0, le=2**31 - 1, description="0 only with echo")
    echo: bool = Field(False, description="begin the reply with the prompt; with logprobs, the prompt's are there too")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="alternatives beside each token's logprob"
    )
    add_special_tokens: bool = Field(True, description="such as a BOS before a text prompt")

    @model_validator(mode="after")
    def _zero_needs_echo(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens: must be at least 1 (0 is only allowed with echo)", "max_tokens")
        return self

    def limit(self) -> int | None:
        return self.max_tokens if "max_tokens" in self.model_fields_set else None

    def top(self) -> int | None:
        return self.logprobs

    def top_prompt(self) -> int | None:
        return self.logprobs if self.echo else None


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: ContentText
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCallMessage] | None = Field(None, max_length=MAX_TOOLS, description="of an assistant")
    tool_call_id: str | None = Field(None, description="of a tool: which call it answers")

    @model_validator(mode="before")
    @classmethod
    def _content_beside_calls(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in ("function_call", "audio"):
                if data.get(name):
                    raise RequestError(f"messages: {name} is not supported by this server", f"messages.{name}")
            if data.get("role") == "assistant" and data.get("content") is None:
                if data.get("tool_calls") or data.get("refusal"):
                    return {**data, "content": data.get("refusal") or ""}
            elif data.get("role") != "assistant" and data.get("tool_calls"):
                raise RequestError("messages: tool_calls belong to the role assistant", "messages.tool_calls")
            if data.get("role") == "tool" and data.get("tool_call_id") is None:
                raise RequestError("messages: the role tool needs a tool_call_id", "messages.tool_call_id")
        return data

    def plain(self) -> dict[str, Any]:
        """As chat templates expect it: strings only, "developer" is "system", arguments of calls parsed."""
        plain: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        for name in ("name", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                plain[name] = value
        if self.tool_calls:
            plain["tool_calls"] = [call.plain() for call in self.tool_calls]
        return plain


class ChatCompletionRequest(GenerationBody):
    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="default: the rest of the context")
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="wins over max_tokens")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="alternatives beside each token")
    tools: list[Tool] = Field([], max_length=MAX_TOOLS, description="functions that the model may call")
    tool_choice: ToolChoice | None = Field(None, description="default: auto where there are tools")
    parallel_tool_calls: bool = Field(True, description="whether one answer may have several calls")

    @model_validator(mode="after")
    def _agree_on_chat(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs is only allowed with logprobs: true", "top_logprobs")
        check_tools(self.tools, self.tool_choice)
        return self

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools

    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


TEMPLATES = {name: REFUSED[name] for name in ("chat_template", "chat_template_kwargs", "continue_final_message")}


class TokenizeRequest(Body):
    refused = TEMPLATES

    model: str | None = None
    prompt: Annotated[str, StringConstraints()] | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=4096)
    tools: list[Tool] = Field([], max_length=MAX_TOOLS, description="with messages")
    add_special_tokens: bool | None = Field(None, description="default: true for a prompt, false for messages")
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either prompt or messages", "prompt")
        if self.tools and self.messages is None:
            raise RequestError("tools is only allowed with messages", "tools")
        return self


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[TokenId] = Field(max_length=2**20)
