"""Tools: what requests say about them, how they are told to the model, and the grammar of a call.

A chat template that carries tools gets them, and its own form of calls is used. Any other model gets a system block of
ours in the Hermes form, in which calls, results and the block itself are written into the messages.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field, PlainValidator, StringConstraints, WithJsonSchema

from engine.errors import RequestError
from server.body import Body
from server.fields import wrong
from server.structured import MAX_GRAMMAR_BYTES, MAX_SCHEMA_BYTES, Structure, bounded, literal

MAX_TOOLS = 128
MAX_CALLS = 16  # in one answer
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Json = dict[str, Any]


class Function(Body):
    name: Name
    description: str | None = None
    parameters: Json | None = Field(None, description="a JSON schema of type object, of at most 64 KiB; default: none")
    strict: bool | None = Field(None, description="true: refuse what the schema has and is not supported")


class Tool(Body):
    type: Literal["function"]
    function: Function


@dataclasses.dataclass(frozen=True)
class Named:
    """The choice of one tool."""

    name: str


def _choice(value: Any) -> str | Named:
    if value in ("none", "auto", "required"):
        return str(value)
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong('must be "none", "auto", "required" or {"type": "function", "function": {"name": "..."}}')
    return Named(function["name"])


_NAME = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
_NAMED = {"type": "object", "properties": {"type": {"const": "function"}, "function": _NAME}, "required": ["function"]}
ToolChoice = Annotated[
    Any,  # a str or Named
    PlainValidator(_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED]}),
]


class CalledFunction(Body):
    name: str = Field(min_length=1, max_length=64)
    arguments: str = Field(description="a JSON object as text")


class ToolCallMessage(Body):
    """A call that an earlier answer made."""

    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self) -> Json:
        """Raises RequestError when the arguments are no JSON object."""
        try:
            arguments = msgspec.json.decode(self.function.arguments or "{}", type=Json)
        except (msgspec.DecodeError, RecursionError):
            param = "messages.tool_calls.function.arguments"
            raise RequestError(f"{param}: must be a JSON object as text", param) from None
        return {
            "id": self.id,
            "type": self.type,
            "function": {"name": self.function.name, "arguments": arguments},
        }


def check_tools(tools: list[Tool], choice: str | Named | None) -> None:
    """Raises RequestError for schemas that are too large or of no object, names given twice, a choice of no tool."""
    names = [tool.function.name for tool in tools]
    for i, tool in enumerate(tools):
        param = f"tools[{i}].function.parameters"
        schema = tool.function.parameters or {}
        if tool.function.name in names[:i]:
            raise RequestError(
                f"tools[{i}].function.name: {tool.function.name!r} is there twice", f"tools[{i}].function.name"
            )
        if schema.get("type", "object") != "object":
            raise RequestError(f"{param}: the type must be object", param)
        bounded(Structure("json", msgspec.json.encode(schema).decode(), param), MAX_SCHEMA_BYTES)
    if choice not in (None, "none") and not tools:
        raise RequestError("tool_choice is only allowed with tools", "tool_choice")
    if isinstance(choice, Named) and choice.name not in names:
        known = ", ".join(names)[:120]
        raise RequestError(f"tool_choice: there is no tool {choice.name[:64]!r}; tools: {known}", "tool_choice")


@dataclasses.dataclass(frozen=True)
class CallForm:
    """How a model writes its calls: begin, call, between, call, ..., end.

    marker: with what `begin` begins; text before it is ordinary. "": an answer that begins with "{" is a call.
    arguments: the key beside "name". id_length: of the ids that its template accepts.
    """

    marker: str
    begin: str
    between: str
    end: str
    arguments: str = "arguments"
    id_length: int = 24


HERMES = CallForm(
    marker="<tool_call>", begin="<tool_call>\n", between="\n</tool_call>\n<tool_call>\n", end="\n</tool_call>"
)
MISTRAL = CallForm(marker="[TOOL_CALLS]", begin="[TOOL_CALLS][", between=", ", end="]", id_length=9)
LLAMA = CallForm(marker="", begin="", between="; ", end="", arguments="parameters")


def form_of(template: str | None) -> CallForm | None:
    """The form that a chat template asks for; None: it carries no tools, or in a form that is not known here."""
    if template is None or not re.search(r"\btools\b", template):
        return None
    if HERMES.marker in template:  # with XML inside it is a form of its own, as Qwen3-Coder's and GLM's
        return None if "<function=" in template or "<arg_key>" in template else HERMES
    if MISTRAL.marker in template and "[ARGS]" not in template:
        spaced = f"{MISTRAL.marker} ["
        return dataclasses.replace(MISTRAL, begin=spaced) if spaced in template else MISTRAL
    return LLAMA if "<|python_tag|>" in template or '"parameters": dictionary' in template else None


BLOCK = """\
You may call functions to help with the user's request. Their signatures are inside <tools></tools>:
<tools>
{tools}
</tools>

For each call, write a JSON object with the function's name and its arguments inside <tool_call></tool_call>:
<tool_call>
{{"name": "<function-name>", "arguments": <arguments-object>}}
</tool_call>"""


def write_out(messages: list[Json], tools: Sequence[Json]) -> list[Json]:
    """Messages for a template that knows no tools: the block, the calls and their results are part of the text."""
    written: list[Json] = []
    for message in messages:
        role, text = message["role"], message["content"]
        if calls := message.get("tool_calls"):
            shown = [json.dumps(_call(call["function"]), ensure_ascii=False) for call in calls]
            text = "\n".join([*([text] if text else []), HERMES.begin + HERMES.between.join(shown) + HERMES.end])
            written.append({"role": role, "content": text})
        elif role == "tool":
            text = f"<tool_response>\n{text}\n</tool_response>"
            if written and written[-1].get("results"):
                written[-1]["content"] += "\n" + text
            else:
                written.append({"role": "user", "content": text, "results": True})
        else:
            written.append(message)
    if tools:
        block = BLOCK.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if written and written[0]["role"] == "system":
            written[0] = {**written[0], "content": f"{written[0]['content']}\n\n{block}"}
        else:
            written.insert(0, {"role": "system", "content": block})
    return [{key: value for key, value in message.items() if key != "results"} for message in written]


def _call(function: Json) -> Json:
    return {"name": function["name"], "arguments": function["arguments"]}


def plain_tools(tools: Sequence[Tool]) -> list[Json]:
    """As chat templates expect them."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.function.name,
                "description": tool.function.description or "",
                "parameters": _schema(tool.function),
            },
        }
        for tool in tools
    ]


def _schema(function: Function) -> Json:
    if not function.parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **function.parameters}


def call_grammar(
    form: CallForm,
    tools: Sequence[Tool],
    choice: str | Named | None,
    several: bool,
    text: Structure | None,
    special_token: Callable[[str], int | None],
) -> Structure:
    """Lark: calls alone (choice required; or a name, which is called once), or text too, of `text`'s schema or any.

    special_token(text): the id of the special token that is written so. Spaces are those of Python's json.dumps, in
    which templates show the model earlier calls.
    """
    if isinstance(choice, Named):
        tools, several = [tool for tool in tools if tool.function.name == choice.name], False
    marker = special_token(form.marker) if form.marker else None
    rest = form.begin.removeprefix(form.marker)
    begin = literal(form.begin) if marker is None else f"<[{marker}]> {literal(rest)}" if rest else f"<[{marker}]>"
    more = f"({literal(form.between)} call){{0,{MAX_CALLS - 1}}}" if several else ""
    body = " ".join(filter(None, ["call", more, literal(form.end) if form.end else ""]))
    calls = f"{begin} {body}" if form.begin else body
    rules = [f"calls: {calls}"]
    if choice == "required" or isinstance(choice, Named):
        rules.insert(0, "start: calls")
    elif text is not None:
        if text.kind != "json":
            raise RequestError(f"{text.param} is only allowed without tools (json_schema goes with them)", text.param)
        rules = ["start: calls | text", *rules, f"text: %json {_with_options(json.loads(text.text), {})}"]
    elif not form.marker:
        rules = ["start: (calls | TEXT)?", *rules, r"TEXT: /[^{](.|\n)*/"]
    elif marker is not None:
        rules = ["start: TEXT calls?", *rules, r"TEXT: /(.|\n)*/"]
    else:
        rules = [f"start: TEXT | head {literal(rest)} {body}", f"head[lazy]: TEXT {literal(form.marker)}"]
        rules.append(r"TEXT: /(.|\n)*/")
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    for i, tool in enumerate(tools):
        key = literal(f'{{"name": "{tool.function.name}", "{form.arguments}": ')
        rules.append(f'call_{i}: {key} arguments_{i} "}}"')
        options = {"item_separator": ", ", "key_separator": ": ", "lenient": not tool.function.strict}
        rules.append(f"arguments_{i}: %json {_with_options(_schema(tool.function), options)}")
    return bounded(Structure("lark", "\n".join(rules), "tools"), MAX_GRAMMAR_BYTES)


def _with_options(schema: Json, options: Json) -> str:
    return json.dumps({**schema, "x-guidance": {"whitespace_flexible": False, **options}}, ensure_ascii=False)
