"""POST /v1/responses: what a reply says, that a stream says the same, and that OpenAI's own client reads both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from engine.checkpoint import Tokenizer
from engine.errors import EngineDeadError
from engine.messages import Output
from tests.server.conform import check_event
from tests.server.live import LiveServer
from tests.server.scripted import ScriptedEngine, ask
from tests.server.test_bad_requests import check_error

QUESTION = "What is the capital of France?"
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": CITY | {"additionalProperties": False},
}


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def respond(server: LiveServer, **body: Any) -> dict[str, Any]:
    response = server.http.post("/v1/responses", json={"input": QUESTION, "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.json()


def read_events(text: str) -> list[dict[str, Any]]:
    """Every event has its type as its name, and its number."""
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == len(events)
        check_event("/v1/responses", event)
        events.append(event)
    return events


def streamed(server: LiveServer, **body: Any) -> list[dict[str, Any]]:
    fields = {"input": QUESTION, "temperature": 0, "stream": True, **body}
    response = server.http.post("/v1/responses", json=fields)
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    return read_events(response.text)


def text_of(response: dict[str, Any]) -> str:
    return response["output"][0]["content"][0]["text"]


def test_a_response_says_what_a_chat_completion_says(server: LiveServer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    chat = server.http.post(
        "/v1/chat/completions", json={"messages": messages, "temperature": 0, "max_tokens": 40}
    ).json()
    response = respond(server, instructions="Be brief.", max_output_tokens=40, store=True, user="me")
    assert text_of(response) == chat["choices"][0]["message"]["content"] and "Paris" in text_of(response)
    assert response["status"] == "completed" and response["id"].startswith("resp_") and response["store"] is False
    usage, said = response["usage"], chat["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (said["prompt_tokens"], said["completion_tokens"])
    assert usage["cost_details"]["device_seconds"]["decode"] > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"max_output_tokens": 30},
        {"max_output_tokens": 3, "top_logprobs": 2},
        {"temperature": 1, "seed": 4, "top_p": 0.9},
    ],
)
def test_a_stream_says_what_the_whole_says(server: LiveServer, fields: dict[str, Any]) -> None:
    fields = {"max_output_tokens": 12, **fields}
    whole, events = respond(server, **fields), streamed(server, **fields)
    last = events[-1]["response"]
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", whole["status"]]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    part = whole["output"][0]["content"][0]
    assert "".join(event["delta"] for event in deltas) == part["text"]
    assert [entry for event in deltas for entry in event["logprobs"]] == part["logprobs"]
    assert len(part["logprobs"]) == (3 if "top_logprobs" in fields else 0)
    for response in (whole, last):
        response.pop("metrics")
        response.pop("usage")
        response.pop("created_at")
        response.pop("id")
        response["output"][0].pop("id")
    assert last == whole


def test_an_answer_that_is_cut_off_is_incomplete(server: LiveServer) -> None:
    response = respond(server, max_output_tokens=2)
    assert response["status"] == response["output"][0]["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_conversation_as_items(server: LiveServer) -> None:
    first = respond(server, max_output_tokens=30)
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        *first["output"],  # as it came
        {"type": "message", "role": "user", "content": "And of Germany?"},
    ]
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": text_of(first)},
        {"role": "user", "content": "And of Germany?"},
    ]
    chat = {"messages": messages, "temperature": 0, "max_tokens": 10}
    said = server.http.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]
    assert text_of(respond(server, input=items, max_output_tokens=10)) == said


def test_json_of_a_schema(server: LiveServer) -> None:
    schema = {"type": "object", "properties": {"country": {"enum": ["France", "Spain"]}}, "required": ["country"]}
    format = {"type": "json_schema", "name": "place", "schema": schema | {"additionalProperties": False}}
    response = respond(server, text={"format": format}, max_output_tokens=40)
    assert json.loads(text_of(response)) in ({"country": "France"}, {"country": "Spain"})
    assert response["text"] == {"format": format}


def test_a_call_and_its_output(server: LiveServer) -> None:
    fields = {"input": "Weather in Paris?", "tools": [WEATHER], "max_output_tokens": 60}
    fields["tool_choice"] = {"type": "function", "name": "get_weather"}
    response, events = respond(server, **fields), streamed(server, **fields)
    (call,) = response["output"]
    assert (call["type"], call["name"], call["status"]) == ("function_call", "get_weather", "completed")
    assert set(json.loads(call["arguments"])) == {"city"}
    kinds = [event["type"].removeprefix("response.") for event in events[2:]]
    assert kinds[0] == "output_item.added" and set(kinds[1:-3]) == {"function_call_arguments.delta"}
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    deltas = [event["delta"] for event in events if event["type"].endswith("arguments.delta")]
    assert "".join(deltas) == call["arguments"] == events[-1]["response"]["output"][0]["arguments"]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
    items = [{"role": "user", "content": "Weather in Paris?"}, call, output]
    after = respond(server, input=items, tools=[WEATHER], tool_choice="none", max_output_tokens=5)
    function = {"name": call["name"], "arguments": call["arguments"]}
    asked = [
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "tool_calls": [{"id": call["call_id"], "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call["call_id"], "content": "sunny"},
    ]
    chat = {"messages": asked, "max_tokens": 5, "temperature": 0}
    said = server.http.post("/v1/chat/completions", json=chat).json()
    assert after["usage"]["input_tokens"] == said["usage"]["prompt_tokens"]
    assert text_of(after) == said["choices"][0]["message"]["content"]


def test_the_openai_client(client: openai.OpenAI) -> None:
    response = client.responses.create(model="smollm2", input=QUESTION, max_output_tokens=40, temperature=0)
    assert "Paris" in response.output_text and response.usage and response.usage.output_tokens > 0
    events = client.responses.create(model="smollm2", input=QUESTION, max_output_tokens=40, temperature=0, stream=True)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == response.output_text
    with client.responses.stream(model="smollm2", input=QUESTION, max_output_tokens=40, temperature=0) as stream:
        for _ in stream:  # the client's own accumulator checks their order
            pass
        assert stream.get_final_response().output_text == response.output_text
    with client.responses.stream(
        model="smollm2",
        input="Weather in Paris?",
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
    ) as stream:
        call = stream.get_final_response().output[0]
        assert call.type == "function_call" and call.name == "get_weather" and "city" in json.loads(call.arguments)
    with pytest.raises(openai.BadRequestError) as kept:
        client.responses.create(model="smollm2", input="And now?", previous_response_id=response.id)
    assert kept.value.param == "previous_response_id"


def test_a_failure_is_the_last_event(tokenizer: Tokenizer) -> None:
    token, dead = Output(id="x", tokens=[504]), EngineDeadError("the engine process was killed")
    body = {"input": "hi", "stream": True}
    template = "{{ messages[0].content }}"
    late = ask(ScriptedEngine(token, dead), tokenizer, "POST", "/v1/responses", template=template, json=body)
    last = read_events(late.text)[-1]
    assert last["type"] == "response.failed" and last["response"]["output"][0]["content"][0]["text"] == "The"
    assert "killed" in last["response"]["error"]["message"]
    early = ask(ScriptedEngine(dead), tokenizer, "POST", "/v1/responses", template=template, json=body)
    assert early.status_code == 503 and "killed" in early.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["hi"]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"role": "user"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]"),
        ({"input": "word " * 3000}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 5000}, "input"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"truncation": "auto"}, "truncation"),
        ({"stream_options": {}}, "stream_options"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "strin"}}}}, "text.format.schema"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [WEATHER | {"name": "a b"}]}, "tools[0].name"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        ({"stop_token_ids": [49152]}, "stop_token_ids"),
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
    ],
)
def test_refused(server: LiveServer, fields: dict[str, Any], param: str) -> None:
    body = {"input": "hi", "max_output_tokens": 1, **fields}
    error = check_error(server.http.post("/v1/responses", json=body), 400, param)
    assert "messages" not in error["message"]
    if "max_output_tokens" in fields or isinstance(fields.get("input"), str):
        check_error(server.http.post("/v1/responses", json=body | {"stream": True}), 400, param)


def test_unknown_fields_are_named(server: LiveServer) -> None:
    response = server.http.post("/responses", json={"input": "hi", "max_output_tokens": 1, "zebra": 1, "n": 2})
    assert response.headers["x-ignored-params"] == "n,zebra"
