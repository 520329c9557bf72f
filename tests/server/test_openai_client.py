"""The official openai package, unmodified, against the live server."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.server.live import LiveServer


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_completion(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="smollm2", prompt="The capital of France is", max_tokens=5, temperature=0, logprobs=2, n=2
    )
    assert [choice.text for choice in reply.choices] == [" Paris.\n\nThe"] * 2
    assert reply.choices[0].logprobs and reply.choices[0].logprobs.tokens == [" Paris", ".", "\n", "\n", "The"]
    assert reply.usage and reply.usage.total_tokens == 15
    assert reply.usage.prompt_tokens_details and reply.usage.prompt_tokens_details.cached_tokens == 0


def test_completion_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="smollm2",
        prompt="The capital of France is",
        max_tokens=5,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == " Paris.\n\nThe"
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 5


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_completion_tokens=16,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        n=2,
        seed=5,
        user="someone",
    )
    assert len(reply.choices) == 2 and reply.choices[0].message.content == reply.choices[1].message.content
    assert "Paris" in (reply.choices[0].message.content or "")
    logprobs = reply.choices[0].logprobs
    assert logprobs and logprobs.content and len(logprobs.content[0].top_logprobs) == 3


def test_chat_stream_helper(client: openai.OpenAI) -> None:
    """The client's own accumulator checks the order and shape of events."""
    with client.chat.completions.stream(
        model="smollm2",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=64,
        temperature=0,
        stream_options={"include_usage": True},
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content and "Paris" in "".join(deltas)
    assert final.usage and final.usage.completion_tokens > 0
    assert final.choices[0].finish_reason == "stop"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2"]
    assert client.models.retrieve("smollm2").id == "smollm2"


def test_errors_map_to_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="smollm2", prompt="x", temperature=3)
    assert bad.value.param == "temperature" and "temperature" in bad.value.message
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="smollm2", prompt="x", max_tokens=100_000, stream=True)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="smollm2", input="x")
