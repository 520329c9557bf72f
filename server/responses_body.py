"""The body of POST /v1/responses, and the chat completion that answers it."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BeforeValidator, Field, PlainValidator, ValidationError, model_validator

from engine.errors import RequestError
from server.body import Body
from server.errors import param_of
from server.fields import ContentText, wrong
from server.protocol import MAX_TOP_LOGPROBS, ChatCompletionRequest, Sampling

REFUSED: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "max_tool_calls": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({},),
}
CHOICES = ("none", "auto", "required")
# The chat's names of things in a response, for messages about them.
NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}


class InputItem(Body):
    """A message, an earlier call of the model, or what it gave."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    id: str | None = Field(None, description="without effect")
    status: str | None = Field(None, description="without effect")
    role: Literal["system", "developer", "user", "assistant"] | None = Field(None, description="of a message")
    content: ContentText | None = Field(None, description="of a message")
    call_id: str | None = Field(None, description="of a call, and of its output")
    name: str | None = Field(None, description="of a call")
    arguments: str | None = Field(None, description="of a call: JSON")
    output: ContentText | None = Field(None, description="of a call's output")

    NEEDS: ClassVar[dict[str, tuple[str, ...]]] = {
        "message": ("role", "content"),
        "function_call": ("call_id", "name", "arguments"),
        "function_call_output": ("call_id", "output"),
    }

    @model_validator(mode="after")
    def _complete(self) -> InputItem:
        for name in self.NEEDS[self.type]:
            if getattr(self, name) is None:
                raise wrong(f"an item of type {self.type} needs {name}")
        return self


class FunctionTool(Body):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema")
    strict: bool | None = Field(None, description="true: refuse what the schema has and is not supported")


class FunctionChoice(Body):
    type: Literal["function"]
    name: str


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, description="of a json_schema")
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _complete(self) -> TextFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise RequestError("text.format.schema: this field is required", "text.format.schema")
        return self

    def of_chat(self) -> dict[str, Any]:
        """As a chat completion's response_format."""
        if self.type != "json_schema":
            return {"type": self.type}
        schema = {"name": self.name, "description": self.description, "schema": self.json_schema, "strict": self.strict}
        return {"type": self.type, "json_schema": {key: value for key, value in schema.items() if value is not None}}


def _choice(value: Any) -> Any:
    named = isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("name"), str)
    if not named and value not in CHOICES:
        raise wrong('must be "none", "auto", "required" or {"type": "function", "name": "..."}')
    return value


class TextConfig(Body):
    format: TextFormat | None = None
    verbosity: str | None = Field(None, description="without effect")


class ResponsesStreamOptions(Body):
    include_obfuscation: bool = Field(False, description="without effect: nothing is padded")


def _items(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise wrong("must be a string or a list of items")
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class ResponsesRequest(Sampling):
    refused = REFUSED

    input: Annotated[list[InputItem], BeforeValidator(_items, json_schema_input_type=str | list[InputItem])] = Field(
        min_length=1, max_length=4096, description="text, or a conversation as items"
    )
    instructions: str | None = Field(None, description="a system message before the input")
    max_output_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="default: the rest of the context")
    text: TextConfig | None = Field(None, description="what the answer's text must look like")
    tools: list[FunctionTool] = Field([], description="functions that the model may call")
    tool_choice: Annotated[
        str | dict[str, Any] | None,
        PlainValidator(_choice, json_schema_input_type=Literal["none", "auto", "required"] | FunctionChoice),
    ] = None
    parallel_tool_calls: bool = True
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="alternatives beside each token")
    include: list[Literal["message.output_text.logprobs"]] = Field([], description="asks for logprobs")
    truncation: Literal["disabled"] = "disabled"
    stream_options: ResponsesStreamOptions | None = None

    @model_validator(mode="after")
    def _agree(self) -> ResponsesRequest:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed with stream: true", "stream_options")
        return self

    def chat(self) -> ChatCompletionRequest:
        """The same as a chat completion. Raises RequestError or RequestValidationError in this body's names."""
        fields = {name: getattr(self, name) for name in self.model_fields_set & Sampling.model_fields.keys()}
        fields |= {"messages": self._messages(), "parallel_tool_calls": self.parallel_tool_calls}
        if self.max_output_tokens is not None:
            fields["max_completion_tokens"] = self.max_output_tokens
        if self.include or self.top_logprobs is not None:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.tools:
            fields["tools"] = [{"type": "function", "function": _function(tool)} for tool in self.tools]
        if isinstance(self.tool_choice, dict):
            fields["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice["name"]}}
        else:
            fields["tool_choice"] = self.tool_choice
        if self.text is not None and self.text.format is not None:
            fields["response_format"] = self.text.format.of_chat()
        try:
            return ChatCompletionRequest.model_validate(fields)
        except RequestError as error:
            raise in_our_names(error) from None
        except ValidationError as error:
            locations = [_ours(param_of(("body", *entry["loc"])) or "") for entry in error.errors()]
            entries = [{**entry, "loc": ("body", at)} for entry, at in zip(error.errors(), locations, strict=True)]
            raise RequestValidationError(entries) from None

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        for item in self.input:
            if item.type == "message":
                messages.append({"role": item.role, "content": item.content})
            elif item.type == "function_call_output":
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
            else:
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
        return messages


def _function(tool: FunctionTool) -> dict[str, Any]:
    return tool.model_dump(include={"name", "description", "parameters", "strict"}, exclude_none=True)


def _ours(name: str) -> str:
    """`messages[1].content` -> `input[1].content`."""
    for theirs, ours in NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return re.sub(r"^(tools\[\d+\])\.function", r"\1", name)


def in_our_names(error: RequestError) -> RequestError:
    param = _ours(error.param) if error.param else error.param
    return RequestError(_ours(str(error)).replace(" messages", " input"), param, error.code)
