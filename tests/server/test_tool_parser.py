"""Tool calls in text: whatever the pieces, the same content and calls; grammars that the parser can read."""

from __future__ import annotations

import itertools
import json
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from llguidance import LLMatcher

from engine.chat import render_chat
from engine.checkpoint import Tokenizer
from engine.errors import RequestError
from engine.grammar import Grammars
from engine.messages import Output
from server.protocol import Message
from server.structured import Structure, grammar_of
from server.tool_parser import ToolParser
from server.tools import (
    HERMES,
    LLAMA,
    MISTRAL,
    CallForm,
    Function,
    Named,
    Tool,
    call_grammar,
    form_of,
    plain_tools,
    write_out,
)
from tests.server.scripted import ScriptedEngine, ask

FORMS = [HERMES, MISTRAL, LLAMA]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"{}\\', max_size=3), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(
    st.tuples(st.from_regex("[a-zA-Z0-9_-]{1,9}", fullmatch=True), st.dictionaries(st.text(max_size=4), JSON)),
    min_size=1,
    max_size=3,
)


def written(form: CallForm, calls: list[tuple[str, Any]]) -> str:
    objects = [json.dumps({"name": name, form.arguments: arguments}, ensure_ascii=False) for name, arguments in calls]
    return form.begin + form.between.join(objects) + form.end


def replay(deltas: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """What a client makes of the deltas of a stream."""
    content, calls = "", []
    for delta in deltas:
        content += delta.get("content", "")
        for entry in delta.get("tool_calls", ()):
            if entry["index"] == len(calls):
                assert entry["type"] == "function" and entry["function"]["name"]
                calls.append({"id": entry["id"], **entry["function"]})
            else:
                assert entry["index"] == len(calls) - 1 and set(entry) == {"index", "function"}
                assert set(entry["function"]) == {"arguments"} and entry["function"]["arguments"]
                calls[-1]["arguments"] += entry["function"]["arguments"]
    return content, calls


def fed(form: CallForm, pieces: list[str]) -> tuple[ToolParser, list[dict[str, Any]]]:
    parser = ToolParser(form)
    return parser, [parser.feed(piece, last=i == len(pieces) - 1) for i, piece in enumerate(pieces)]


@pytest.mark.parametrize("form", FORMS, ids=["hermes", "mistral", "llama"])
@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(calls=CALLS, text=st.text("a <tol_[TO]é", max_size=12), cuts=st.sets(st.integers(1, 300)))
def test_calls_come_out_whatever_the_pieces(form: CallForm, calls: Any, text: str, cuts: set[int]) -> None:
    text = text if form.marker else ""
    whole = text + written(form, calls)
    ends = [0, *sorted(cut for cut in cuts if cut < len(whole)), len(whole)]
    parser, deltas = fed(form, [whole[a:b] for a, b in itertools.pairwise(ends)])
    assert parser.content == text
    assert [(call.name, json.loads(call.arguments)) for call in parser.calls] == calls
    content, heard = replay(deltas)
    assert content == text
    assert heard == [{"id": call.id, "name": call.name, "arguments": call.arguments} for call in parser.calls]
    assert len({call.id for call in parser.calls}) == len(calls)


@pytest.mark.parametrize("form", FORMS, ids=["hermes", "mistral", "llama"])
@hypothesis.given(text=st.text("a <tol_cal>[TOOL_CALLS]x", max_size=30), cuts=st.sets(st.integers(1, 30)))
def test_text_without_a_call_is_content(form: CallForm, text: str, cuts: set[int]) -> None:
    hypothesis.assume(not form.marker or form.marker not in text)
    ends = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    parser, deltas = fed(form, [text[a:b] for a, b in itertools.pairwise(ends)])
    assert parser.content == text and not parser.calls and replay(deltas)[0] == text


@pytest.mark.parametrize("form", FORMS, ids=["hermes", "mistral", "llama"])
def test_an_answer_that_was_cut_off(form: CallForm) -> None:
    """Arguments as far as they came; a call whose arguments did not begin is content. Nothing is shown twice."""
    whole = written(form, [("f", {"a": "}"}), ("g", {"b": [1, 2]})])
    for end in range(len(whole)):
        parser, deltas = fed(form, list(whole[:end]) or [""])
        at_once, _ = fed(form, [whole[:end]])
        content, heard = replay(deltas)
        assert content == parser.content == at_once.content
        assert [(call["name"], call["arguments"]) for call in heard] == [(c.name, c.arguments) for c in at_once.calls]
        for call, full in zip(heard, ['{"a": "}"}', '{"b": [1, 2]}'], strict=False):
            assert full.startswith(call["arguments"])


def tool(name: str, parameters: Any = None, strict: bool | None = None) -> Tool:
    return Tool(type="function", function=Function(name=name, parameters=parameters, strict=strict))


CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}, "unit": {"enum": ["C", "F"]}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"type": "string", "maxLength": 9}},
}
TOOLS = [tool("get_weather", CITY), tool("now")]


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)


def accepts(grammars: Grammars, structure: Structure, text: str) -> bool:
    """Is the text a whole answer?"""
    matcher = LLMatcher(grammars.vocabulary, grammar_of(structure.kind, structure.text))
    assert not matcher.is_error(), matcher.get_error()
    tokens = grammars._source.encode(text, False)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def grammar(form: CallForm, choice: Any, several: bool = True, text: Structure | None = None) -> Structure:
    return call_grammar(form, TOOLS, choice, several, text, lambda text: None)


@pytest.mark.parametrize("form", FORMS, ids=["hermes", "mistral", "llama"])
def test_what_a_choice_allows(grammars: Grammars, form: CallForm) -> None:
    one = written(form, [("get_weather", {"city": "Rome", "unit": "C"})])
    two = written(form, [("get_weather", {"city": "Rome"}), ("now", {})])
    wrong = written(form, [("get_weather", {"unit": "C"})])
    unknown = written(form, [("rm", {})])
    allowed = {
        "required": (grammar(form, "required"), [one, two], ["", "It is warm.", wrong, unknown]),
        "one": (grammar(form, "required", several=False), [one], ["", two, wrong]),
        "named": (grammar(form, Named("now")), [written(form, [("now", {})])], [one, two, "", "Now."]),
        "auto": (grammar(form, None), ["It is warm.", "", one, two], [wrong, unknown, one + one[:3]]),
    }
    for name, (structure, good, bad) in allowed.items():
        assert [text for text in good if not accepts(grammars, structure, text)] == [], name
        assert [text for text in bad if accepts(grammars, structure, text)] == [], name
    if form.marker:
        assert accepts(grammars, allowed["auto"][0], "Let me see. " + one)
        assert not accepts(grammars, allowed["auto"][0], "Let me see. " + wrong)


def test_a_call_or_json_of_a_schema(grammars: Grammars) -> None:
    schema = Structure("json", '{"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}', "p")
    both = grammar(HERMES, "auto", text=schema)
    assert accepts(grammars, both, '{"a":null}') and accepts(grammars, both, written(HERMES, [("now", {})]))
    assert not accepts(grammars, both, "text") and not accepts(grammars, both, "{}")
    with pytest.raises(RequestError, match="only allowed without tools"):
        grammar(HERMES, "auto", text=Structure("regex", "a", "structured_outputs.regex"))


def test_a_tools_schema_is_lenient_unless_it_is_strict(grammars: Grammars) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "string", "format": "colour"}}}
    for strict in (None, True):
        structure = call_grammar(HERMES, [tool("f", odd, strict)], "required", False, None, lambda text: None)
        matcher = LLMatcher(grammars.vocabulary, grammar_of(structure.kind, structure.text))
        assert matcher.is_error() is bool(strict)


def test_the_form_is_the_templates() -> None:
    assert form_of(None) is None and form_of("{{ messages }}") is None
    assert form_of("{% if tools %}<tool_call>{% endif %}") is HERMES
    assert form_of("{% if tools %}<tool_call>\n<function={{ name }}>{% endif %}") is None
    assert form_of("{% if tools %}[TOOL_CALLS][{% endif %}") is MISTRAL
    spaced = form_of("{% if tools %}[TOOL_CALLS] [{% endif %}")
    assert spaced is not None and spaced.begin == "[TOOL_CALLS] ["
    assert form_of("{% if tools is not none %}<|python_tag|>{% endif %}") is LLAMA
    assert form_of("{% if tools %}functools{% endif %}") is None  # a form that is not known: ours


def test_conversations_for_a_template_without_tools() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "one", "tool_call_id": "1"},
        {"role": "tool", "content": "two", "tool_call_id": "1"},
        {"role": "user", "content": "And?"},
    ]
    plain = write_out(messages, [{"type": "function", "function": {"name": "f"}}])
    assert [message["role"] for message in plain] == ["system", "user", "assistant", "user", "user"]
    assert plain[0]["content"].startswith("Be brief.\n\nYou may call functions")
    assert '<tools>\n{"type": "function", "function": {"name": "f"}}\n</tools>' in plain[0]["content"]
    one = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert plain[2]["content"] == f"{one}\n{one}"
    assert plain[3]["content"] == "<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response>"
    assert set().union(*plain) == {"role", "content"}
    assert write_out(messages[1:2], [{"type": "function"}])[0]["role"] == "system"
    assert write_out(messages[:2], []) == messages[:2]


QWEN = """\
{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}
{% for message in messages %}[{{ message.role }}] {{ message.content }}
{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{% endfor %}{% endfor %}"""


def test_a_template_that_carries_tools_gets_them_as_objects(tokenizer: Tokenizer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "21"}]
    plain = [Message.model_validate(message).plain() for message in messages]
    text = render_chat(QWEN, plain, tokenizer, True, plain_tools(TOOLS))
    assert written(HERMES, [("get_weather", {"city": "Rome"})]) in text and "[tool] 21" in text
    assert '"name": "now", "description": "", "parameters": {"type": "object"' in text


@pytest.mark.parametrize("stream", [False, True])
def test_the_reply_under_such_a_template(tokenizer: Tokenizer, stream: bool) -> None:
    tokens = tokenizer.encode("Wait. " + written(HERMES, [("now", {}), ("now", {"a": 1})]), False)
    outputs = [Output(id="x", tokens=[token]) for token in tokens] + [Output(id="x", tokens=[2], finish_reason="stop")]
    tools = [{"type": "function", "function": {"name": "now"}}]
    body = {"messages": [{"role": "user", "content": "Time?"}], "tools": tools, "stream": stream}
    short = "{% if tools %}<tool_call>{% endif %}{{ messages[0].content }}"
    reply = ask(ScriptedEngine(*outputs), tokenizer, "POST", "/v1/chat/completions", template=short, json=body)
    assert reply.status_code == 200, reply.text
    if not stream:
        choice = reply.json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Wait. "
        called = [call["function"] for call in choice["message"]["tool_calls"]]
        assert called == [{"name": "now", "arguments": "{}"}, {"name": "now", "arguments": '{"a": 1}'}]
        return
    chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[-1]["finish_reason"] == "tool_calls"
    content, calls = replay([{key: value for key, value in choice["delta"].items() if value} for choice in choices])
    assert content == "Wait. " and [call["arguments"] for call in calls] == ["{}", '{"a": 1}']
