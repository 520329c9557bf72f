"""Structured output and tools against a live server with SmolLM2."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
import psutil
import pydantic
import pytest

from tests.server.live import LiveServer


class Item(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    name: str = pydantic.Field(max_length=6)
    tags: list[Literal["red", "deep blue"]] = pydantic.Field(max_length=1)


class Box(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    items: list[Item] = pydantic.Field(min_length=1, max_length=2)
    size: int = pydantic.Field(ge=-5, le=99)
    note: str | None = pydantic.Field(None, max_length=6)


SCHEMA = Box.model_json_schema()
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
HARD = "start: A\nA: " + " & ".join(f"/.*a.{{{i}}}.*/" for i in range(3, 40))  # minutes and gigabytes


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


def test_a_hundred_samples_are_valid_and_finished(server: LiveServer) -> None:
    """Temperature 1, nesting, enums, arrays, optional fields; compact; and not all the same."""

    def sample(seed: int) -> dict[str, Any]:
        fields = {"n": 10, "temperature": 1, "seed": seed, "max_tokens": 120, "response_format": json_schema(SCHEMA)}
        return server.chat("Describe a box with toys in it.", **fields).json()

    with ThreadPoolExecutor(5) as threads:
        replies = list(threads.map(sample, range(10)))
    choices = [choice for reply in replies for choice in reply["choices"]]
    assert len(choices) == 100
    for choice in choices:
        text = choice["message"]["content"]
        assert choice["finish_reason"] == "stop", text
        Box.model_validate_json(text)
        assert json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False) == text or "\\" in text
    assert len({choice["message"]["content"] for choice in choices}) > 90
    assert len(Counter("note" in json.loads(choice["message"]["content"]) for choice in choices)) == 2


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": r"^\d{3}-[a-z]{2,5}\.$"}}, r"\d{3}-[a-z]+\."),
        ({"structured_outputs": {"choice": ['say "hi"', "a\nb\\", "ü😀"]}}, r'say "hi"|a\nb\\|ü😀'),
        ({"structured_outputs": {"grammar": 'start: "x" N\nN: /[0-9]{2}/'}}, r"x\d\d"),
        ({"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}}, "yes|no"),
        ({"structured_outputs": {"json": {"type": "integer", "minimum": 10, "maximum": 12}}}, "1[012]"),
        ({"structured_outputs": {"json": '{"enum": ["é", null]}'}}, '"é"|null'),
        ({"response_format": json_schema({"type": "array", "items": {"type": "boolean"}, "maxItems": 1})}, r"\[\w*\]"),
    ],
    ids=["regex", "choice", "lark", "gbnf", "json", "json as text", "json_schema"],
)
def test_every_kind_on_both_endpoints(server: LiveServer, fields: dict[str, Any], pattern: str) -> None:
    settings = {"max_tokens": 40, "temperature": 1, "n": 2, "seed": 3} | fields
    texts = [choice["message"]["content"] for choice in server.chat("Hello", **settings).json()["choices"]]
    texts += [choice["text"] for choice in server.complete("Hello", **settings).json()["choices"]]
    assert len(texts) == 4
    for text in texts:
        assert re.fullmatch(pattern, text, re.ASCII), text


def test_json_object(server: LiveServer) -> None:
    reply = server.chat("A person as a JSON object with a name", response_format={"type": "json_object"}, max_tokens=60)
    choice = reply.json()["choices"][0]
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_streaming_equals_not_streaming(exact: LiveServer) -> None:
    body = {"temperature": 1, "seed": 5, "n": 1, "max_tokens": 32, "tools": TOOLS}
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    for fields in ({"tool_choice": "required"}, {"tool_choice": "auto"}, {"response_format": json_schema(SCHEMA)}):
        asked = body | fields if "tool_choice" in fields else {**body, **fields, "tools": None}
        whole = exact.chat(messages[0]["content"], **asked).json()["choices"]
        heard: list[dict[str, Any]] = [{"content": "", "calls": [], "finish_reason": None} for _ in whole]
        for event in exact.stream("/v1/chat/completions", messages=messages, **asked):
            for choice in event["choices"]:
                said, delta = heard[choice["index"]], choice["delta"]
                said["content"] += delta.get("content") or ""
                said["finish_reason"] = choice["finish_reason"] or said["finish_reason"]
                for entry in delta.get("tool_calls") or ():
                    if "id" in entry:
                        assert entry["index"] == len(said["calls"])
                        said["calls"].append([entry["function"]["name"], ""])
                    said["calls"][entry["index"]][1] += entry["function"]["arguments"]
        for choice, said in zip(whole, heard, strict=True):
            message = choice["message"]
            assert (message["content"] or "", choice["finish_reason"]) == (said["content"], said["finish_reason"])
            calls = [
                [call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", ())
            ]
            assert calls == said["calls"]


@pytest.mark.parametrize("stream", [False, True])
def test_required_and_named(server: LiveServer, stream: bool) -> None:
    choices: list[tuple[Any, set[str]]] = [
        ("required", {"get_weather", "now"}),
        ({"type": "function", "function": {"name": "now"}}, {"now"}),
        ({"type": "function", "function": {"name": "get_weather"}}, {"get_weather"}),
    ]
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    for choice, names in choices:
        asked: dict[str, Any] = {"model": "smollm2", "tools": TOOLS, "tool_choice": choice, "temperature": 1, "seed": 2}
        asked |= {"messages": [{"role": "user", "content": "Weather in Oslo?"}], "max_tokens": 200}
        if stream:
            with client.chat.completions.stream(**asked) as events:
                list(events)
                reply = events.get_final_completion().choices[0]
        else:
            reply = client.chat.completions.create(**asked).choices[0]
        assert reply.finish_reason == "tool_calls" and reply.message.tool_calls
        assert not reply.message.content
        for call in reply.message.tool_calls:
            assert call.type == "function" and call.function.name in names and call.id.startswith("call_")
            arguments = json.loads(call.function.arguments)
            if call.function.name == "get_weather":
                assert len(arguments.pop("city")) <= 12 and arguments.pop("unit", "C") in ("C", "F")
            assert arguments == {}
        if choice != "required":
            assert len(reply.message.tool_calls) == 1


def test_one_call_at_a_time_and_none(server: LiveServer) -> None:
    asked = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 100}
    message = server.chat("Weather in Rome and in Oslo?", **asked).json()["choices"][0]["message"]
    assert len(message["tool_calls"]) == 1
    free = server.chat("Say yes.", tools=TOOLS, tool_choice="none", max_tokens=8).json()
    plain = server.chat("Say yes.", max_tokens=8).json()
    assert free["choices"][0]["message"]["content"] == plain["choices"][0]["message"]["content"]
    assert free["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]  # the model is not told of them


def test_a_conversation_with_a_result(server: LiveServer) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "What is the weather in Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny, 21 degrees"},
    ]
    body = {"messages": messages, "tools": TOOLS, "max_tokens": 40, "temperature": 0}
    reply = server.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    told = server.http.post("/tokenize", json={"messages": messages, "tools": TOOLS, "return_token_strs": True}).json()
    prompt = "".join(told["token_strs"])
    assert told["count"] == reply.json()["usage"]["prompt_tokens"]
    for part in ('"name": "now"', "<tool_response>\nsunny, 21 degrees", '"arguments": {"city": "Oslo"}'):
        assert part in prompt, prompt


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        yield client


def test_parse_of_the_openai_client(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "A box with a red ball"}]
    reply = client.chat.completions.parse(
        model="smollm2", messages=messages, response_format=Box, max_tokens=200, temperature=1, seed=1
    )
    assert isinstance(reply.choices[0].message.parsed, Box)
    tools: Any = [openai.pydantic_function_tool(Item, name="add_item")]
    reply = client.chat.completions.parse(
        model="smollm2",
        messages=messages,
        tools=tools,
        tool_choice="required",
        max_tokens=200,
        seed=1,
        parallel_tool_calls=False,
    )
    calls = reply.choices[0].message.tool_calls
    assert calls and isinstance(calls[0].function.parsed_arguments, Item)


def test_a_grammar_that_is_too_hard_is_refused_in_time(server: LiveServer) -> None:
    """The easy one asked for meanwhile is not held up, nothing is left running, and the next one works."""
    choice = {"structured_outputs": {"choice": ["yes", "no"]}, "max_tokens": 4}
    assert server.chat("Well?", **choice).status_code == 200  # the process that checks has started
    with ThreadPoolExecutor(2) as threads:
        started = time.monotonic()
        hard = threads.submit(server.chat, "Well?", structured_outputs={"grammar": HARD})
        easy = server.chat("Well?", structured_outputs={"choice": ["maybe", "no"]}, max_tokens=4)
        assert not hard.done() and easy.status_code == 200
        refused = hard.result()
        seconds = time.monotonic() - started
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "structured_outputs.grammar"
    assert "2 s" in refused.json()["error"]["message"] and seconds < 15, seconds
    (worker,) = [
        child for child in psutil.Process(server.process.pid).children() if "server.grammar_worker" in child.cmdline()
    ]
    assert worker.children() == []
    worker.kill()  # it comes back
    assert server.chat("Well?", structured_outputs={"choice": ["ja", "nein"]}, max_tokens=4).status_code == 200


def test_stop_strings_and_logprobs_go_with_a_grammar(server: LiveServer) -> None:
    fields = {"structured_outputs": {"regex": "[a-z]{3}-[a-z]{3}"}, "stop": "-", "logprobs": True, "top_logprobs": 2}
    choice = server.chat("Hello", max_tokens=20, **fields).json()["choices"][0]
    assert re.fullmatch("[a-z]{3}", choice["message"]["content"]) and choice["stop_reason"] == "-"
    assert all(len(entry["top_logprobs"]) == 2 for entry in choice["logprobs"]["content"])
    server.wait_idle()
