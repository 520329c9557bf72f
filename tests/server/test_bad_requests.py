"""Bad input: each gets its status and `param`, a short message for a person, and the next request is answered."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest

from engine.errors import RequestError
from server.service import Service
from tests.server.live import LiveServer

HI = [{"role": "user", "content": "hi"}]


def completion(param: str | None, status: int = 400, **fields: Any) -> Any:
    body = {"prompt": "hi", "max_tokens": 1, **fields}
    shown = json.dumps(fields)[:60]
    return pytest.param("/v1/completions", body, status, param, id=f"completion {shown}")


def chat(param: str | None, status: int = 400, **fields: Any) -> Any:
    body = {"messages": HI, "max_tokens": 1, **fields}
    shown = json.dumps(fields)[:60]
    return pytest.param("/v1/chat/completions", body, status, param, id=f"chat {shown}")


def content(value: Any) -> list[Any]:
    return [{"role": "user", "content": value}]


def tool(name: str, parameters: Any = None, **fields: Any) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


def called(arguments: str) -> Any:
    return {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}


def schema(value: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


CASES = [
    completion("model", 404, model="gpt-4"),
    completion("model", model=3),
    completion("prompt", prompt=None),
    completion("prompt", prompt=""),
    completion("prompt", prompt=[]),
    completion("prompt", prompt=[""]),
    completion("prompt", prompt=[[]]),
    completion("prompt", prompt=7),
    completion("prompt", prompt={"a": 1}),
    completion("prompt", prompt=["a", [1], 2.5]),
    completion("prompt", prompt=[True, False]),
    completion("prompt", prompt=["x"] * 129),
    completion("prompt", prompt=[49152]),
    completion("prompt", prompt=[-1]),
    completion("prompt", prompt=[10**30]),
    completion("prompt", prompt="word " * 3000),
    completion("prompt", prompt="hi", max_tokens=5000),
    completion("max_tokens", max_tokens=0),
    completion("prompt", prompt=[1] * 513, max_tokens=0, echo=True),
    completion("prompt", prompt=[1] * 512, max_tokens=1, echo=True),
    completion("prompt", prompt=[1] * 512, echo=True),
    completion("max_tokens", max_tokens=-1),
    completion("max_tokens", max_tokens="2"),
    completion("max_tokens", max_tokens=1.0),
    completion("max_tokens", max_tokens=True),
    completion("temperature", temperature=-0.1),
    completion("temperature", temperature=2.1),
    completion("temperature", temperature=True),
    completion("temperature", temperature="1"),
    completion("top_p", top_p=0),
    completion("top_p", top_p=1.01),
    completion("top_k", top_k=-2),
    completion("top_k", top_k=1.5),
    completion("min_p", min_p=1.1),
    completion("presence_penalty", presence_penalty=2.5),
    completion("frequency_penalty", frequency_penalty=-2.5),
    completion("repetition_penalty", repetition_penalty=0),
    completion("min_tokens", min_tokens=2),
    completion("min_tokens", min_tokens=17, max_tokens=None),
    completion("min_tokens", min_tokens=-1),
    completion("n", n=0),
    completion("n", n=17),
    completion("n", n="2"),
    completion("best_of", best_of=2),
    completion("stop", stop=["a"] * 5),
    completion("stop", stop=""),
    completion("stop", stop="x" * 257),
    completion("stop", stop=[1]),
    completion("stop_token_ids", stop_token_ids=list(range(65))),
    completion("stop_token_ids", stop_token_ids=[49152]),
    completion("stop_token_ids[0]", stop_token_ids=[-1]),
    completion("seed", seed=2**63),
    completion("seed", seed=1.5),
    completion("logprobs", logprobs=21),
    completion("logprobs", logprobs=True),
    completion("logit_bias", logit_bias={"49152": 1}),
    completion("logit_bias", logit_bias={"1": 101}),
    completion("logit_bias", logit_bias={"one": 1}),
    completion("logit_bias", logit_bias={"1": True}),
    completion("logit_bias", logit_bias={str(i): 1 for i in range(1025)}),
    completion("logit_bias", logit_bias=[1]),
    completion("stream", stream="yes"),
    completion("stream_options", stream_options={"include_usage": True}),
    completion("stream_options.include_usage", stream=True, stream_options={"include_usage": 1}),
    completion("echo", echo=1),
    completion("cache_salt", cache_salt=""),
    completion("request_id", request_id="a b"),
    completion("priority", priority=0.5),
    completion("suffix", suffix="tail"),
    completion("use_beam_search", use_beam_search=True),
    completion("prompt_logprobs", prompt_logprobs=1),
    completion("allowed_token_ids", allowed_token_ids=[1]),
    completion("bad_words", bad_words=["x"]),
    completion("guided_json", guided_json={}),
    completion("truncate_prompt_tokens", truncate_prompt_tokens=5),
    completion("length_penalty", length_penalty=0.5),
    completion("logits_processors", logits_processors=["x"]),
    completion("return_token_ids", return_token_ids=True),
    completion("return_tokens_as_token_ids", return_tokens_as_token_ids=True),
    completion("spaces_between_special_tokens", spaces_between_special_tokens=False),
    chat("model", 404, model="gpt-4"),
    chat("messages", messages=None),
    chat("messages", messages=[]),
    chat("messages", messages="hi"),
    chat("messages[0]", messages=["hi"]),
    chat("messages[0].role", messages=[{"role": "robot", "content": "hi"}]),
    chat("messages[0].role", messages=[{"content": "hi"}]),
    chat("messages[0].content", messages=[{"role": "user"}]),
    chat("messages[0].content", messages=content(5)),
    chat("messages[0].content", messages=content([])),
    chat("messages[0].content", messages=content([{"type": "text"}])),
    chat("messages[0].content", messages=content([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/"}}])),
    chat("messages[0].content", messages=content([{"type": "input_audio", "input_audio": {}}])),
    chat("messages", messages=content("word " * 3000)),
    chat("messages", max_tokens=5000),
    chat("max_tokens", max_tokens=0),
    chat("max_completion_tokens", max_completion_tokens=0),
    chat("logprobs", logprobs=1),
    chat("top_logprobs", top_logprobs=2),
    chat("top_logprobs", logprobs=True, top_logprobs=21),
    completion("tools", tools=[tool("f")]),
    chat("tools", tools="f"),
    chat("tools", tools=[tool(f"f{i}") for i in range(129)]),
    chat("tools[0].type", tools=[{"type": "custom", "custom": {"name": "f"}}]),
    chat("tools[0].function", tools=[{"type": "function"}]),
    chat("tools[0].function.name", tools=[tool("a b")]),
    chat("tools[0].function.name", tools=[tool("x" * 65)]),
    chat("tools[1].function.name", tools=[tool("f"), tool("f")]),
    chat("tools[0].function.parameters", tools=[tool("f", [])]),
    chat("tools[0].function.parameters", tools=[tool("f", {"type": "string"})]),
    chat("tools[0].function.parameters", tools=[tool("f", {"description": "x" * 2**16})]),
    chat("tools[0].function.parameters", tools=[tool("f", {"properties": {"a" * 500: {"type": "strin"}}}), tool("g")]),
    chat("tools[1].function.parameters", tools=[tool("g"), tool("f", {"properties": {"a": {"not": {}}}}, strict=True)]),
    chat("tool_choice", tool_choice="required"),
    chat("tool_choice", tools=[tool("f")], tool_choice={"type": "function", "function": {"name": "g"}}),
    chat("tool_choice", tools=[tool("f")], tool_choice="sometimes"),
    chat("parallel_tool_calls", tools=[tool("f")], parallel_tool_calls="no"),
    chat("messages.tool_calls", messages=[{"role": "user", "content": "x", "tool_calls": [called("{}")]}]),
    chat("messages[0].tool_calls[0].id", messages=[{"role": "assistant", "tool_calls": [{"function": {}}]}]),
    chat("messages.tool_calls.function.arguments", messages=[{"role": "assistant", "tool_calls": [called("[1]")]}]),
    chat("messages.tool_call_id", messages=[{"role": "tool", "content": "5"}]),
    chat("response_format.type", response_format={"type": "xml"}),
    chat("response_format.type", response_format={}),
    chat("response_format", response_format="json_object"),
    chat("response_format.json_schema", response_format={"type": "json_schema"}),
    chat("response_format.json_schema.schema", response_format=schema({"type": "strin"})),
    chat("response_format.json_schema.schema", response_format=schema({"not": {"type": "string"}})),
    chat("response_format.json_schema.schema", response_format=schema({"$ref": "http://127.0.0.1:9/x"})),
    chat("response_format.json_schema.schema", response_format=schema({"minimum": 5, "maximum": 3, "type": "integer"})),
    chat("response_format.json_schema.schema", response_format=schema({"description": "x" * 2**16})),
    chat("response_format.json_schema.schema", response_format=schema([])),
    chat("structured_outputs", structured_outputs={}),
    chat("structured_outputs", structured_outputs={"regex": "a", "choice": ["b"]}),
    chat("structured_outputs", structured_outputs={"regex": "a"}, response_format={"type": "json_object"}),
    chat("structured_outputs.regex", structured_outputs={"regex": "(a"}),
    chat("structured_outputs.regex", structured_outputs={"regex": "a(?=b)"}),
    chat("structured_outputs.regex", structured_outputs={"regex": "a"}, tools=[tool("f")]),
    chat("structured_outputs.choice", structured_outputs={"choice": []}),
    chat("structured_outputs.choice[0]", structured_outputs={"choice": [1]}),
    chat("structured_outputs.grammar", structured_outputs={"grammar": "start: ("}),
    chat("structured_outputs.grammar", structured_outputs={"grammar": "start: " + "x" * 2**16}),
    completion("structured_outputs.json", structured_outputs={"json": "{"}),
    completion("structured_outputs.json", structured_outputs={"json": {"type": "object", "properties": 5}}),
    completion("response_format.json_schema.schema", response_format=schema({"type": "array", "minItems": "x"})),
    chat("functions", functions=[{"name": "f"}]),
    chat("echo", echo=True),
    chat("modalities", modalities=["text", "audio"]),
    chat("reasoning_effort", reasoning_effort="low"),
    chat("chat_template", chat_template="{{ messages }}"),
    chat("chat_template_kwargs", chat_template_kwargs={"enable_thinking": True}),
]


def check_error(response: Any, status: int, param: str | None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert len(response.content) < 2048
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    message = error["message"]
    assert len(message) > 15 and not re.search(r"Traceback|\.py\b|/(home|root|tmp|usr|var)/", message), message
    if param is not None:
        assert param.split(".")[-1].split("[")[0] in message or param == "model" or error["code"], message
    return error


@pytest.mark.parametrize(("path", "body", "status", "param"), CASES)
def test_refused(server: LiveServer, path: str, body: Any, status: int, param: str | None) -> None:
    check_error(server.http.post(path, json=body), status, param)


def test_still_answers_after_all_that(server: LiveServer) -> None:
    assert server.complete(max_tokens=2).json()["choices"][0]["text"] == " Paris."
    server.wait_idle()


def test_body_over_8_mib(server: LiveServer) -> None:
    body = b'{"prompt": "' + b"x" * (8 * 2**20) + b'"}'
    headers = {"Content-Type": "application/json"}
    check_error(server.http.post("/v1/completions", content=body, headers=headers), 413, None)
    pieces = (body[i : i + 65536] for i in range(0, len(body), 65536))  # chunked: no length is announced
    check_error(server.http.post("/v1/completions", content=pieces, headers=headers), 413, None)


def test_context_length_names_both_numbers(server: LiveServer) -> None:
    response = server.complete("word" + " word" * 499, max_tokens=100, stream=True)
    error = check_error(response, 400, "prompt")
    assert error["code"] == "context_length_exceeded"
    assert "512" in error["message"] and str(500 + 100) in error["message"], error


def test_many_mistakes_give_a_short_answer(server: LiveServer) -> None:
    response = server.complete([1], stop_token_ids=["x" * 1000] * 60, temperature=9)
    error = check_error(response, 400, "temperature")
    assert "51 more" in error["message"] and 150 < error["message"].count("x") <= 200


@pytest.mark.parametrize(
    ("structure", "said"),
    [
        ({"regex": "[a"}, "this is no regular expression: unclosed character class"),
        ({"grammar": 'root ::= ("a"'}, r"Expected '\)'"),
        ({"grammar": "root ::= a"}, "Rule 'a' not found"),
        ({"grammar": "start: a"}, 'at 1.8.: unknown name: "a"'),
        ({"json": {"type": "strin"}}, "Invalid type: strin"),
        ({"json": {"type": "z" * 5000}}, "Invalid type: z{160,200}…"),
    ],
)
def test_what_is_wrong_with_a_grammar(server: LiveServer, structure: dict[str, Any], said: str) -> None:
    (name,) = structure
    error = check_error(server.chat(structured_outputs=structure), 400, f"structured_outputs.{name}")
    assert re.fullmatch(rf"structured_outputs.{name}: ({said})", error["message"].split(" at line")[0]), error


def test_null_is_absent_and_neutral_values_pass(server: LiveServer) -> None:
    fields = ["suffix", "stop", "seed", "logprobs", "logit_bias", "n", "best_of", "top_k", "tools", "stream_options"]
    assert server.complete(max_tokens=1, **dict.fromkeys(fields)).status_code == 200
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]}
    response = server.chat(max_tokens=1, **neutral, top_k=-1, best_of=1, user="me", metadata={"a": "b"}, store=True)
    assert response.status_code == 200, response.text
    assert "x-ignored-params" not in response.headers


def test_unknown_fields_are_named(server: LiveServer) -> None:
    def ignored(path: str, **body: Any) -> str:
        response = server.http.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.headers["x-ignored-params"]

    path, hi = "/v1/completions", {"prompt": "hi", "max_tokens": 1}
    assert ignored(path, **hi, zebra=1, apple=None, mango={"a": [1]}) == "mango,zebra"
    assert ignored(path, **hi, **{"é\r\nset-cookie: a": 1, "🥖": 2}) == r"\xe9\r\nset-cookie:\x20a,\U0001f956"
    assert ignored(path, **hi, **{" ": 1}) == r"\x20"
    assert len(ignored(path, **hi, **{"🥖" * 900: 2})) == 1024
    options = {"stream": True, "stream_options": {"apple": 1}}
    assert ignored(path, **hi, **options) == "stream_options.apple"
    assert ignored("/tokenize", messages=[*HI, HI[0] | {"mango": 1}], zebra=1) == "zebra,messages[1].mango"
    assert ignored("/detokenize", tokens=[], zebra=1) == "zebra"


def test_a_token_that_the_model_has_no_embedding_for() -> None:
    """On a GPU it would end the engine's process. A vocabulary may be larger than the table."""
    service: Any = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=10, num_embeddings=8))
    Service.check_ids(service, [0, 7], "prompt", 8)
    with pytest.raises(RequestError, match=r"prompt: token id 9 is outside the vocabulary \(0 to 7\)"):
        Service.check_ids(service, [0, 9], "prompt", 8)
    Service.check_ids(service, [9], "tokens")
    with pytest.raises(RequestError, match=r"\(0 to 9\)"):
        Service.check_ids(service, [10], "prompt", None)
