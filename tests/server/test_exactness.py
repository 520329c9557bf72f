"""What a reply promises to the bit: prompt logprobs are those of the model, and a batch changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.server.live import LiveServer, settings
from tests.server.test_completions import joined

TEXT = "The licence says what may be done with a copy of the program, and what may not."


def test_echoed_logprobs_are_those_of_a_direct_forward(random_checkpoint: Callable[..., Path]) -> None:
    """Against transformers in float32: every token of the prompt, and the five most likely in its place."""
    import torch
    import transformers

    folder = random_checkpoint()
    live = LiveServer(settings(str(folder), {"dtype": "float32", "max_model_len": 256}))
    try:
        ids = live.http.post("/tokenize", json={"prompt": TEXT}).json()["tokens"]
        whole = (ids * 10)[:256]  # the whole context
        ask = {"max_tokens": 0, "echo": True, "logprobs": 5}
        replies = [live.complete(prompt, **ask).json() for prompt in (TEXT, whole)]
        streamed = joined(list(live.stream("/v1/completions", prompt=whole, **ask)))
        generated = live.metric("vllm:generation_tokens_total")
    finally:
        assert live.stop() == 0
    assert generated == 0 and len(ids) > 30 and replies[0]["choices"][0]["text"] == TEXT
    assert streamed == replies[1]["choices"][0]["text"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for reply, prompt in zip(replies, (ids, whole), strict=True):
        assert reply["usage"]["prompt_tokens"] == len(prompt) and reply["usage"]["completion_tokens"] == 0
        assert reply["choices"][0]["finish_reason"] == "length" and reply["metrics"]["time_to_first_token_ms"] > 0
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        logprobs = reply["choices"][0]["logprobs"]
        assert logprobs["token_logprobs"][0] is None
        said = expected[range(len(prompt) - 1), prompt[1:]].tolist()
        assert logprobs["token_logprobs"][1:] == pytest.approx(said, abs=1e-4)
        for row, top in zip(expected, logprobs["top_logprobs"][1:], strict=False):
            assert sorted(top.values(), reverse=True)[:5] == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)


@pytest.fixture(scope="module")
def invariant(smollm2: Path) -> Iterator[LiveServer]:
    """In the default precision, with --batch-invariant."""
    live = LiveServer(settings(str(smollm2), {"batch_invariant": True}))
    yield live
    assert live.stop() == 0


def test_a_seed_gives_the_same_text_alone_and_in_a_batch_of_16(invariant: LiveServer) -> None:
    def body(i: int) -> dict[str, Any]:
        prompt = " ".join(f"{word} {i}" for word in ["alpha", "beta", "gamma", "delta"][: i % 4 + 1])
        return {"prompt": prompt, "max_tokens": 16, "temperature": 1.0, "ignore_eos": True, "logprobs": 2, "seed": i}

    def ask(i: int) -> dict[str, Any]:
        return invariant.http.post("/v1/completions", json=body(i)).json()["choices"][0]

    def stream(i: int) -> str:
        return joined(list(invariant.stream("/v1/completions", **body(i))))

    sample = (0, 5, 15)
    alone = {i: ask(i) for i in sample}
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(16)))
        streamed = list(pool.map(stream, range(16)))
    for i in sample:
        assert together[i] == alone[i]  # text, and the logprobs to the last bit
        assert streamed[i] == alone[i]["text"]
    assert len({choice["text"] for choice in together}) == 16
