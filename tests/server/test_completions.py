"""/v1/completions and /v1/chat/completions: what replies say, and that a stream says the same."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.live import LiveServer

FRANCE = "The capital of France is"
GREEDY = " Paris.\n\nThe answer is: 2018-01-22"
LONG = "Tell me about the following numbers: " + " ".join(str(i) for i in range(60))


def joined(events: list[dict[str, Any]], index: int = 0) -> str:
    """Text of one choice, out of completion or chat events."""
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)


def test_completion(exact: LiveServer) -> None:
    reply = exact.complete(FRANCE, max_tokens=20).json()
    (choice,) = reply["choices"]
    assert choice["text"].startswith(GREEDY)
    assert choice["finish_reason"] == "length" and choice["stop_reason"] is None and choice["logprobs"] is None
    assert reply["object"] == "text_completion" and reply["id"].startswith("cmpl-") and reply["model"] == "smollm2"
    usage = reply["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 20, 25)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    metrics = reply["metrics"]
    assert 0 <= metrics["queue_time_ms"] <= metrics["time_to_first_token_ms"]
    assert metrics["mean_itl_ms"] > 0 and metrics["tokens_per_second"] > 0


def test_chat(server: LiveServer) -> None:
    reply = server.chat(max_tokens=30).json()
    (choice,) = reply["choices"]
    assert choice["message"]["role"] == "assistant" and "Paris" in choice["message"]["content"]
    assert reply["object"] == "chat.completion" and reply["id"].startswith("chatcmpl-")


def test_chat_content_parts_and_developer_role(server: LiveServer) -> None:
    def ask(role: str, content: Any) -> dict[str, Any]:
        messages = [{"role": role, "content": content}, {"role": "user", "content": "Hi", "name": "Ann"}]
        body = {"messages": messages, "temperature": 0, "max_completion_tokens": 8, "max_tokens": 1}
        reply = server.http.post("/chat/completions", json=body).json()
        assert reply["usage"]["completion_tokens"] == 8  # max_completion_tokens wins
        return reply

    plain = ask("system", "Be brief.\nBe kind.")
    parts = ask("developer", [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}])
    assert plain["choices"] == parts["choices"]
    assert plain["usage"]["prompt_tokens"] == parts["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3, "temperature": 0.9, "seed": 7},
        {"stop": [".", "\n"]},
        {"stop": ["is: 2018"], "include_stop_str_in_output": True},
        {"logprobs": 3},
        {"echo": True, "logprobs": 0},
        {"echo": True, "max_tokens": 0, "logprobs": 2},
        {"prompt": [FRANCE, "Once upon a time", [504, 3575, 282]], "n": 2},
        {"prompt": "Write 巴黎 🥖 and 🧑‍🚀 again: 巴黎 🥖 and 🧑‍🚀. Again: 巴黎", "max_tokens": 20},
        {"temperature": 1.0, "seed": 3, "top_p": 0.9, "top_k": 40, "min_p": 0.02, "presence_penalty": 0.5},
        {"logit_bias": {"7042": -100}, "frequency_penalty": 0.3, "repetition_penalty": 1.1, "min_tokens": 4},
    ],
)
def test_completion_stream_equals_whole(request: pytest.FixtureRequest, fields: dict[str, Any]) -> None:
    server: LiveServer = request.getfixturevalue("exact" if "n" in fields else "server")
    body = {"prompt": FRANCE, "max_tokens": 12, "temperature": 0, **fields}
    whole = server.http.post("/v1/completions", json=body).json()
    events = list(server.stream("/v1/completions", **body, stream_options={"include_usage": True}))
    assert len({event["id"] for event in events}) == 1 and events[0]["object"] == "text_completion"
    assert events[-1]["choices"] == []
    for detail in (whole["usage"], events[-1]["usage"]):
        detail.pop("prompt_tokens_details")  # the second finds more in the prefix cache
        details = detail.pop("cost_details")  # its time is its own
        assert details["device_seconds"]["prompt"] > 0 and "--price" in details["reason"]
    assert events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    for choice in whole["choices"]:
        parts = [part for event in events for part in event["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert (parts[-1]["finish_reason"], parts[-1]["stop_reason"]) == (
            choice["finish_reason"],
            choice["stop_reason"],
        )
        for key, values in (choice["logprobs"] or {}).items():
            streamed = [value for part in parts if part["logprobs"] for value in part["logprobs"][key]]
            assert streamed == values


@pytest.mark.parametrize("fields", [{}, {"n": 2, "logprobs": True, "top_logprobs": 2}, {"stop": ["capital"]}])
def test_chat_stream_equals_whole(request: pytest.FixtureRequest, fields: dict[str, Any]) -> None:
    server: LiveServer = request.getfixturevalue("exact" if "n" in fields else "server")
    whole = server.chat(max_tokens=8, **fields).json()
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    events = list(server.stream("/v1/chat/completions", messages=messages, max_tokens=8, **fields))
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    for choice in whole["choices"]:
        parts = [part for event in events for part in event["choices"] if part["index"] == choice["index"]]
        assert parts[0]["delta"]["role"] == "assistant" and all("role" not in part["delta"] for part in parts[1:])
        assert joined(events, choice["index"]) == choice["message"]["content"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        if choice["logprobs"]:
            streamed = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
            assert streamed == choice["logprobs"]["content"]


def test_continuous_usage(server: LiveServer) -> None:
    options = {"continuous_usage_stats": True}
    events = list(server.stream("/v1/completions", prompt=FRANCE, max_tokens=5, stream_options=options))
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 4, 5]
    assert all(event["usage"]["cost"] is None for event in events)  # known when the reply is complete


def test_stop_string_never_leaks(server: LiveServer) -> None:
    """ "is: 2" spans tokens; while streaming, what could be its beginning is held back."""
    events = list(server.stream("/v1/completions", prompt=FRANCE, max_tokens=20, stop=["nowhere", "is: 2"]))
    assert joined(events) == " Paris.\n\nThe answer "
    assert events[-1]["choices"][0]["stop_reason"] == "is: 2" and events[-1]["choices"][0]["finish_reason"] == "stop"


def test_stop_token_id(server: LiveServer) -> None:
    (dot,) = server.http.post("/tokenize", json={"prompt": "."}).json()["tokens"]
    choice = server.complete(FRANCE, max_tokens=20, stop_token_ids=[dot]).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (" Paris", "stop", dot)
    choice = server.complete(FRANCE, max_tokens=20, stop_token_ids=[dot], include_stop_str_in_output=True).json()[
        "choices"
    ][0]
    assert choice["text"] == " Paris."


def test_logprobs_of_a_completion(exact: LiveServer) -> None:
    choice = exact.complete(FRANCE, max_tokens=3, logprobs=3).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"] and logprobs["text_offset"] == [0, 6, 7]
    first = logprobs["top_logprobs"][0]
    assert first == pytest.approx({" Paris": -0.2581, " the": -2.7407, " London": -4.3844}, abs=2e-3)
    assert logprobs["token_logprobs"][0] == first[" Paris"]


def test_logprobs_of_a_chat(server: LiveServer) -> None:
    choice = server.chat("Answer with 巴黎 and 🥖", max_tokens=24, logprobs=True, top_logprobs=2).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 24 or choice["finish_reason"] == "stop"
    data = b"".join(bytes(entry["bytes"]) for entry in content)
    assert data.decode(errors="replace").startswith(choice["message"]["content"])
    for entry in content:
        assert len(entry["top_logprobs"]) == 2
        assert entry["logprob"] == pytest.approx(entry["top_logprobs"][0]["logprob"])  # greedy takes the best
    without = server.chat(max_tokens=2, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in without] == [[], []]


def test_echo_scores_the_prompt(exact: LiveServer) -> None:
    """The text's own logprobs: what a model finds as it generates it must be what it says of it as a prompt."""
    generated = exact.complete(FRANCE, max_tokens=6, logprobs=1).json()["choices"][0]
    text = FRANCE + generated["text"]
    echoed = exact.complete(text, max_tokens=0, echo=True, logprobs=1).json()
    (choice,) = echoed["choices"]
    assert choice["text"] == text and choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == text
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][5:] == pytest.approx(generated["logprobs"]["token_logprobs"], abs=2e-3)
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert text[offset:].startswith(token)
    assert echoed["usage"]["completion_tokens"] == 0 and echoed["usage"]["prompt_tokens"] == 11


def test_echo_of_token_ids(server: LiveServer) -> None:
    ids = server.http.post("/tokenize", json={"prompt": FRANCE}).json()["tokens"]
    choice = server.complete(ids, max_tokens=2, echo=True).json()["choices"][0]
    assert choice["text"] == FRANCE + " Paris."


def test_several_prompts_and_choices_are_ordered(exact: LiveServer) -> None:
    prompts = [FRANCE, "The capital of Germany is"]
    reply = exact.complete(prompts, n=2, max_tokens=4).json()
    texts = [choice["text"] for choice in reply["choices"]]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert texts == [
        exact.complete(prompt, max_tokens=4).json()["choices"][0]["text"] for prompt in prompts for _ in "12"
    ]
    assert reply["usage"]["prompt_tokens"] == 10 and reply["usage"]["completion_tokens"] == 16


def test_seed_fixes_each_choice(exact: LiveServer) -> None:
    def draw(**fields: Any) -> list[str]:
        reply = exact.complete(FRANCE, max_tokens=6, **{"temperature": 1.0, "seed": 11, "n": 4, **fields}).json()
        return [choice["text"] for choice in reply["choices"]]

    first = draw()
    assert draw() == first and len(set(first)) > 1
    assert draw(n=2) == first[:2]  # choice i draws from stream (seed, i), however many there are
    assert draw(seed=12) != first


def test_prefix_cache_is_reported(server: LiveServer) -> None:
    prompt = LONG + " cache"
    first = server.complete(prompt, max_tokens=2).json()
    again = server.complete(prompt, max_tokens=2).json()
    assert first["choices"][0]["text"] == again["choices"][0]["text"]
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 0 < cached < again["usage"]["prompt_tokens"] and cached % 64 == 0
    salted = server.complete(prompt, max_tokens=2, cache_salt="mine").json()
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_choices_share_their_prompt(server: LiveServer) -> None:
    """Of n choices the first computes the prompt, the others take its full blocks from the prefix cache."""
    hits = server.metric("vllm:prefix_cache_hits_total")
    reply = server.complete(LONG + " share", n=4, temperature=1, max_tokens=2).json()
    blocks = (reply["usage"]["prompt_tokens"] - 1) // 64 * 64
    server.wait_idle()
    assert server.metric("vllm:prefix_cache_hits_total") - hits >= 3 * blocks > 0


def test_max_tokens_defaults(server: LiveServer) -> None:
    assert server.complete("One, two, three,", ignore_eos=True).json()["usage"]["completion_tokens"] == 16
    prompt = "word" + " word" * 505
    usage = server.complete(prompt, ignore_eos=True).json()["usage"]  # six places are left of the context
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (506, 6)


def test_request_id_is_part_of_the_reply_id(server: LiveServer) -> None:
    assert server.complete(max_tokens=1, request_id="job-1.a").json()["id"] == "cmpl-job-1.a"
