"""Offline use, on a small random checkpoint in float32 and on SmolLM2."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, SamplingParams
from engine.errors import CheckpointError, FenError, RequestError

PROMPTS = ["import json", "def make(", "a", "small random ones that transformers saves"]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm(random_checkpoint: Callable[..., Path]) -> Iterator[LLM]:
    with LLM(str(random_checkpoint()), dtype="float32", kv_cache_tokens=2048, block_size=16, threads=1) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_is_left_over(llm: LLM) -> Iterator[None]:
    yield
    assert llm._core.stats().blocks_used == 0 and not llm._core.has_work


def test_the_capital_of_france(smollm2: Path) -> None:
    with LLM(str(smollm2), dtype="float32", kv_cache_tokens=256, threads=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=15, logprobs=3)
        (reply,) = llm.generate("The capital of France is", params)
        assert reply.text == " Paris.\n\nThe answer is: 2018-01-22"[: len(reply.text)] and len(reply.text) > 20
        assert reply.logprobs is not None
        top = [(llm.tokenizer.decode([token]), logprob) for token, logprob in reply.logprobs[0].top]
        assert [text for text, _ in top] == [" Paris", " the", " London"]
        assert [logprob for _, logprob in top] == pytest.approx([-0.2581, -2.7407, -4.3844], abs=2e-3)
        (answer,) = llm.chat([{"role": "user", "content": "Say hello."}], GREEDY)
        assert "Hello" in answer.text and "<|im_" not in answer.text


def test_one_or_several_prompts(llm: LLM) -> None:
    together = llm.generate(PROMPTS, GREEDY)
    assert len(together) == len(PROMPTS)
    for prompt, reply in zip(PROMPTS, together, strict=True):
        ids = llm.tokenizer.encode(prompt)
        assert reply.prompt == ids
        assert llm.generate(prompt, GREEDY) == [alone_of(reply, llm.generate(prompt, GREEDY)[0])]
        assert llm.generate(ids, GREEDY)[0].tokens == reply.tokens  # one prompt of token ids
        assert llm.generate([ids], GREEDY)[0].tokens == reply.tokens
        assert 1 <= len(reply.tokens) <= 12 and reply.text == llm.tokenizer.decode(reply.tokens)
    assert llm.generate([], GREEDY) == []


def alone_of(reply: Any, alone: Any) -> Any:
    """The reply with the one field that may differ: what the prefix cache held."""
    reply.cached_tokens = alone.cached_tokens
    return reply


def test_params_for_each_prompt(llm: LLM) -> None:
    lengths = [1, 5, 3, 9]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    replies = llm.generate(PROMPTS, params)
    assert [len(reply.tokens) for reply in replies] == lengths
    assert {reply.finish_reason for reply in replies} == {"length"}
    with pytest.raises(RequestError, match="4 prompts and 2 params"):
        llm.generate(PROMPTS, params[:2])


def test_a_seed_gives_the_same_text_alone_and_in_a_batch(llm: LLM) -> None:
    params = [SamplingParams(temperature=1.0, seed=7, stream=i % 2, max_tokens=10) for i in range(4)]
    replies = llm.generate([PROMPTS[0]] * 4, params)
    assert replies[0].tokens == replies[2].tokens and replies[1].tokens == replies[3].tokens
    assert replies[0].tokens != replies[1].tokens
    assert llm.generate(PROMPTS[0], params[1])[0].tokens == replies[1].tokens


def test_stop_strings_cut_and_cancel(llm: LLM) -> None:
    free = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    (whole,) = llm.generate(PROMPTS[0], free)
    stop = whole.text[len(whole.text) // 2 :][:2]
    cut_at = whole.text.find(stop)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop=(stop,), logprobs=0)
    cut, other = llm.generate([PROMPTS[0], PROMPTS[1]], [params, free])
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (whole.text[:cut_at], "stop", stop)
    assert cut.tokens == whole.tokens[: len(cut.tokens)] and len(cut.tokens) < 30
    assert cut.logprobs is not None and len(cut.logprobs) == len(cut.tokens)
    assert len(other.tokens) == 30  # its neighbour goes on


def test_stop_tokens(llm: LLM) -> None:
    (whole,) = llm.generate(PROMPTS[0], GREEDY)
    token = whole.tokens[3]
    at = whole.tokens.index(token)
    (cut,) = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(token,)))
    assert cut.tokens == whole.tokens[: at + 1] and cut.stop_reason == token
    assert cut.text == llm.tokenizer.decode(whole.tokens[:at])


def test_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    (reply,) = llm.generate(PROMPTS[3], params)
    assert reply.logprobs is not None and reply.prompt_logprobs is not None
    assert [entry.token for entry in reply.logprobs] == reply.tokens
    for entry in reply.logprobs:
        assert entry.rank == 1 and entry.top[0] == (entry.token, entry.logprob) and len(entry.top) == 2
    assert reply.prompt_logprobs[0] is None
    assert [entry.token for entry in reply.prompt_logprobs if entry is not None] == reply.prompt[1:]
    assert all(-20 < entry.logprob <= 0 for entry in reply.prompt_logprobs if entry is not None)


def test_chat(llm: LLM) -> None:
    one = [{"role": "user", "content": "import"}]
    two = [*one, {"role": "assistant", "content": "json"}, {"role": "user", "content": "def"}]
    (reply,) = llm.chat(one, GREEDY)
    assert llm.tokenizer.decode(reply.prompt, skip_special_tokens=False) == "<s>user: import</s>"
    assert [r.tokens for r in llm.chat([one, two], GREEDY)] == [reply.tokens, llm.chat(two, GREEDY)[0].tokens]
    (long,) = llm.chat(one)
    assert long.finish_reason == "stop" or len(long.prompt) + len(long.tokens) == llm.info.max_model_len


def test_streaming_equals_generate(llm: LLM) -> None:
    for prompt in PROMPTS:
        assert "".join(llm.stream(prompt, GREEDY)) == llm.generate(prompt, GREEDY)[0].text


def test_leaving_a_stream_frees_it(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=200, ignore_eos=True, seed=1))
    next(stream)
    with pytest.raises(FenError, match="busy with another call"):
        llm.generate("a", GREEDY)
    stream.close()
    assert llm._core.stats().running == 0
    assert llm.generate("a", GREEDY)[0].tokens


@pytest.mark.parametrize(
    ("prompt", "params", "sentence"),
    [
        ([1, 512], {}, "token id 512; allowed: 0 to 511"),
        ([-1], {}, "token id -1"),
        ([], {}, "prompt is empty"),
        ([5] * 600, {}, "600"),
        ("a", {"temperature": math.nan}, "temperature is nan; allowed: 0.0 to 2.0"),
        ("a", {"temperature": "hot"}, "temperature is 'hot'"),
        ("a", {"top_p": 0}, "top_p is 0"),
        ("a", {"max_tokens": 0}, "max_tokens is 0; allowed: 1"),
        ("a", {"logprobs": 21}, "logprobs is 21; allowed: 0 to 20"),
        ("a", {"stop": ("",)}, "stop has an empty string"),
        ("a", {"stop": "end"}, "not a tuple of strings"),
        ("a", {"stop_token_ids": (600,)}, "stop_token_ids has the token id 600"),
        ("a", {"logit_bias": {600: 1.0}}, "logit_bias has the token id 600"),
        ("a", {"logit_bias": {6: 101.0}}, "allowed: -100 to 100"),
    ],
)
def test_bad_requests(llm: LLM, prompt: Any, params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError) as error:
        llm.generate([prompt] if prompt == [] else prompt, SamplingParams(**params))
    assert sentence in str(error.value)
    with pytest.raises(RequestError):
        llm.generate([[5, 6], prompt], [GREEDY, SamplingParams(**params)])
    assert llm.generate([5, 6], GREEDY)[0].tokens  # the next one is answered, and the good one above is not left behind


def test_options() -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        LLM("x", no_such_option=1)
    with pytest.raises(FenError, match=r"option has the wrong type.*max_num_seqs"):
        LLM("x", max_num_seqs="many")
    with pytest.raises(CheckpointError, match="no model"):
        LLM("./nowhere.gguf")


def test_closed(random_checkpoint: Callable[..., Path]) -> None:
    llm = LLM(str(random_checkpoint()), dtype="float32", kv_cache_tokens=64, threads=1)
    llm.close()
    with pytest.raises(FenError, match="closed"):
        llm.generate("a")


def test_import_is_lazy() -> None:
    check = "import sys; from engine import SamplingParams; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
