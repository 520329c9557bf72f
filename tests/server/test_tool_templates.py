"""Tools with checkpoints whose own chat templates carry them, against live servers: the form of the template's calls,
with marks of calls that are tokens of their own, special or not. The weights are random: the grammar does the work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.live import LiveServer, settings
from tests.server.test_structured import TOOLS
from tests.server.test_tool_parser import replay

# What matters of the templates of Mistral 7B v0.3, of Qwen 2.5 and of Llama 3.1.
MISTRAL = """\
{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}{% if m.tool_calls %}[TOOL_CALLS][{% for call in m.tool_calls %}\
{{ call.function | tojson }}{{ ", " if not loop.last }}{% endfor %}]{% else %}[INST]{{ m.content }}[/INST]{% endif %}
{%- endfor %}"""
QWEN = """\
{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}
{%- for m in messages %}<s>{{ m.role }} {{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}</s>{% endfor %}"""
LLAMA = """\
{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}Respond in the format {"name": function name, \
"parameters": dictionary of argument name and its value}.{% endif %}
{%- for m in messages %}<s>{{ m.role }} {{ m.content }}{% for call in m.tool_calls or [] %}{\
"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}{% endfor %}</s>\
{% endfor %}"""
KINDS = {
    "mistral": (MISTRAL, [("[TOOL_CALLS]", True)]),
    "qwen": (QWEN, [("<tool_call>", False), ("</tool_call>", False)]),
    "llama": (LLAMA, []),
}
ASK = {
    "messages": [{"role": "user", "content": "Weather in Oslo?"}],
    "tools": TOOLS,
    "temperature": 1,
    "max_tokens": 200,
}


@pytest.fixture(scope="module", params=KINDS)
def carrying(
    request: pytest.FixtureRequest, random_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    import transformers
    from tokenizers import AddedToken

    template, marks = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param) / "model"
    shutil.copytree(random_checkpoint(vocab_size=512 + len(marks), max_position_embeddings=1024), folder)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in marks])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    live = LiveServer(settings(str(folder), {"dtype": "float32", "max_model_len": 1024}))
    yield live
    assert live.stop() == 0


def heard(live: LiveServer, **fields: Any) -> tuple[str, list[dict[str, Any]], str]:
    """-> content, calls and finish_reason: those of a stream, which are those of the whole reply."""
    reply = live.http.post("/v1/chat/completions", json=ASK | fields)
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    events = live.stream("/v1/chat/completions", **(ASK | fields))
    choices = [choice for event in events for choice in event["choices"]]
    content, calls = replay([{key: value for key, value in at["delta"].items() if value} for at in choices])
    finish = choices[-1]["finish_reason"]
    whole = [call["function"] for call in choice["message"].get("tool_calls") or ()]
    assert [{"name": call["name"], "arguments": call["arguments"]} for call in calls] == whole
    assert (content, finish) == (choice["message"]["content"] or "", choice["finish_reason"])
    return content, calls, finish


def check_call(call: dict[str, Any]) -> None:
    arguments = json.loads(call["arguments"])
    if call["name"] == "get_weather":
        assert len(arguments.pop("city")) <= 12 and arguments.pop("unit", "C") in ("C", "F")
    assert arguments == {} and call["name"] in ("get_weather", "now")


def test_calls_in_the_templates_form(carrying: LiveServer) -> None:
    for seed in range(5):
        content, calls, finish = heard(carrying, tool_choice="required", seed=seed)
        assert (content, finish) == ("", "tool_calls") and calls
        for call in calls:
            check_call(call)
    _, (call,), _ = heard(carrying, tool_choice={"type": "function", "function": {"name": "now"}}, seed=1)
    assert call["name"] == "now"
    check_call(call)


def test_auto_is_text_or_calls(carrying: LiveServer) -> None:
    for seed in range(5):
        content, calls, finish = heard(carrying, tool_choice="auto", seed=seed, max_tokens=60)
        assert calls or content or finish == "stop"
        if finish == "tool_calls":
            for call in calls:
                check_call(call)


def test_a_conversation_with_calls(carrying: LiveServer) -> None:
    function = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    messages = [
        *ASK["messages"],
        {"role": "assistant", "tool_calls": [{"id": "call_123456", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "call_123456", "content": "sunny"},
    ]
    told = carrying.http.post(
        "/tokenize", json={"messages": messages, "tools": TOOLS, "return_token_strs": True}
    ).json()
    prompt = "".join(told["token_strs"])
    assert '"description": "The weather in a city"' in prompt and "sunny" in prompt
    assert "You may call functions" not in prompt  # the block for templates without tools
    _, calls, _ = heard(carrying, messages=messages, tool_choice="required", seed=1)
    for call in calls:
        check_call(call)
