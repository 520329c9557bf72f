"""Masks against a brute-force check, and grammars in the whole engine."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import pytest
from llguidance import LLMatcher

from engine import LLM, SamplingParams
from engine.checkpoint import Tokenizer, open_checkpoint
from engine.checkpoint.dummy import SHAPES
from engine.checkpoint.gguf import read_gguf
from engine.checkpoint.gguf_tokenizer import tokenizer_from_gguf
from engine.core.loop import EngineCore
from engine.errors import RequestError
from engine.grammar import Grammars, Guide
from tests.engine.checkpoint.llama_cpp_variants import SENTENCEPIECE, variant

WORDS = ["a", "ab", "abc", "b", "ba", "c", "cab"]  # every prefix of an accepted text can be continued to one
CHOICES = "start: " + " | ".join(map(json.dumps, WORDS))
INTEGER = LLMatcher.grammar_from_json_schema({"type": "integer", "minimum": 0, "maximum": 99})


@pytest.fixture(scope="module")
def checkpoint_path(random_checkpoint: Callable[..., Path]) -> Path:
    return random_checkpoint()


@pytest.fixture(scope="module")
def grammars(checkpoint_path: Path) -> Grammars:
    checkpoint = open_checkpoint(str(checkpoint_path))
    return Grammars(checkpoint.tokenizer, checkpoint.config.vocab_size, checkpoint.config.eos_token_ids)


@pytest.fixture(scope="module")
def tokenizer(checkpoint_path: Path) -> Tokenizer:
    return open_checkpoint(str(checkpoint_path)).tokenizer


@pytest.fixture(scope="module")
def llm(checkpoint_path: Path) -> Iterator[LLM]:
    options = {"dtype": "float32", "threads": 1, "block_size": 16, "max_model_len": 256, "kv_cache_tokens": 1024}
    with LLM(str(checkpoint_path), **options) as llm:
        yield llm


def follow(grammars: Grammars, guide: Guide, tokens: list[int]) -> None:
    for token in tokens:
        assert guide.allowed()[token]
        grammars.advance([(guide, token)])


def test_an_idle_engine_makes_what_the_first_grammar_needs(checkpoint_path: Path) -> None:
    checkpoint = open_checkpoint(str(checkpoint_path))
    size = checkpoint.config.vocab_size
    grammars = Grammars(checkpoint.tokenizer, size, checkpoint.config.eos_token_ids)
    EngineCore(SimpleNamespace(grammars=grammars), SimpleNamespace()).idle()  # type: ignore[arg-type]
    assert vars(grammars)["vocabulary"].vocab_size == size
    endless = Grammars(checkpoint.tokenizer, size, ())  # no grammar can end: there is nothing to make, and no error
    endless.prepare()
    assert "vocabulary" not in vars(endless)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(word=st.sampled_from(WORDS), data=st.data())
def test_a_mask_is_what_brute_force_finds(
    grammars: Grammars, tokenizer: Tokenizer, word: str, data: st.DataObject
) -> None:
    """After any beginning, in any tokens: those that leave a beginning of a word, and the end after a word."""
    guide = grammars.guide(CHOICES)
    text = ""
    while True:
        allowed = guide.allowed()
        may = {word[len(text) :] for word in WORDS if word.startswith(text)}
        for id in range(grammars.vocab_size):
            piece = tokenizer.token_bytes(id).decode(errors="replace")
            if id in tokenizer.eos_ids:
                assert allowed[id] == (text in WORDS)
            elif tokenizer.is_special(id):
                assert not allowed[id]
            else:
                assert allowed[id] == (bool(piece) and any(rest.startswith(piece) for rest in may)), piece
        choices = [id for id in range(grammars.vocab_size) if allowed[id]]
        token = data.draw(st.sampled_from(choices))
        if token in tokenizer.eos_ids:
            return
        follow(grammars, guide, [token])
        text += tokenizer.token_bytes(token).decode()


def test_guides_of_one_grammar_go_their_own_ways(grammars: Grammars, tokenizer: Tokenizer) -> None:
    first, second = grammars.guide(CHOICES), grammars.guide(CHOICES)
    a, b = tokenizer.token_to_id("a"), tokenizer.token_to_id("b")
    assert a is not None and b is not None
    grammars.advance([(first, a), (second, b)])
    (eos,) = tokenizer.eos_ids
    assert first.allowed()[b] and not second.allowed()[b] and first.allowed()[eos] and second.allowed()[eos]


@pytest.mark.parametrize("grammar", ["start: (", "start: nothing", '{"grammars": [{"json_schema": {"type": "x"}}]}'])
def test_what_is_no_grammar_is_refused(grammars: Grammars, grammar: str) -> None:
    with pytest.raises(RequestError) as error:
        grammars.guide(grammar)
    assert "<state>" not in str(error.value) and "\n" not in str(error.value)


def test_a_grammar_that_outgrows_its_limits_fails_its_request_alone(llm: LLM) -> None:
    hard = "start: A\nA: /(.*a.{10})/ & ~/(.*b.{11})/ & /(.*c.{9}.*)/"
    good, bad = llm.generate(["ab", "ab"], [params(CHOICES), params(hard)])
    assert good.text in WORDS and good.finish_reason == "stop"
    assert bad.finish_reason == "error" and bad.error and "grammar" in bad.error


def params(grammar: str, **fields: object) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 12, "grammar": grammar} | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("fields", [{}, {"ignore_eos": True}, {"min_tokens": 9}, {"temperature": 0.0}, {"top_k": 1}])
def test_a_complete_text_ends(llm: LLM, fields: dict[str, object]) -> None:
    """ignore_eos and min_tokens hold the end back while there is anything else to say, and no longer."""
    for result in llm.generate(["x y", "ab"] * 4, [params(CHOICES, seed=i, **fields) for i in range(8)]):
        assert result.text in WORDS and result.finish_reason == "stop", result
        if "ignore_eos" in fields or "min_tokens" in fields:
            assert not any(word.startswith(result.text) and word != result.text for word in WORDS), result.text


def test_without_an_end_it_runs_to_the_limit(llm: LLM) -> None:
    (result,) = llm.generate("ab", params("start: /[ab]*/", ignore_eos=True))
    assert len(result.tokens) == 12 and result.finish_reason == "length" and re.fullmatch("[ab]*", result.text)


def test_logprobs_are_those_before_the_mask(llm: LLM) -> None:
    (free,) = llm.generate("ab", SamplingParams(max_tokens=1, temperature=0, logprobs=3))
    (held,) = llm.generate("ab", params(INTEGER, temperature=0, logprobs=3))
    assert free.logprobs and held.logprobs
    assert [token for token, _ in held.logprobs[0].top] == [token for token, _ in free.logprobs[0].top]
    assert held.logprobs[0].rank > 1


def test_a_seed_gives_the_same_alone_and_beside_others(llm: LLM) -> None:
    prompts, each = (
        ["ab", "x", "the"],
        [params(INTEGER, seed=7), params("start: /[a-f]{1,9}/", seed=7), SamplingParams()],
    )
    together = llm.generate(prompts, each)
    alone = [llm.generate(prompt, one)[0] for prompt, one in zip(prompts[:2], each[:2], strict=True)]
    assert [result.tokens for result in together[:2]] == [result.tokens for result in alone]


def test_preempted_sequences_go_on_where_they_were(checkpoint_path: Path, llm: LLM) -> None:
    """A pool for a third of what runs: everything is computed again, the guides are not."""
    grammar = "start: /([a-c]{20}[0-9]{20})+/"
    each = [params(grammar, seed=i, max_tokens=100, ignore_eos=True) for i in range(6)]
    options = {"dtype": "float32", "threads": 1, "block_size": 16, "max_model_len": 128, "kv_cache_tokens": 256}
    with LLM(str(checkpoint_path), **options) as tight:  # type: ignore[arg-type]
        squeezed = tight.generate(["ab"] * 6, each)
        assert tight._core.stats().preemptions > 0
    assert [result.tokens for result in squeezed] == [result.tokens for result in llm.generate(["ab"] * 6, each)]
    for result in squeezed:
        assert re.fullmatch("([a-c]{20}[0-9]{20})*([a-c]{0,20}|[a-c]{20}[0-9]{0,20})", result.text)


def test_cancelled_while_it_is_compiled(llm: LLM) -> None:
    core = llm._core
    from engine.messages import Request

    core.add(Request(id="x", prompt=[5], params=params("start: /[a-z]{1,77}/")))
    assert core.scheduler.stats().waiting == 1
    core.cancel(["x"])
    assert [(output.id, output.finish_reason) for output in core.step()] == [("x", "abort")]
    while core._compiling:
        core.step()
    assert not core.has_work and core.stats().waiting == 0
    assert llm.generate("ab", params(CHOICES))[0].text in WORDS


@pytest.mark.parametrize("kind", ["smollm", "llama-bpe", SENTENCEPIECE])
def test_every_kind_of_tokenizer(smollm2: Path, kind: str) -> None:
    """Of a GGUF file: whatever is drawn of what is allowed, the bytes make JSON of the schema, and it can end."""
    file = read_gguf(smollm2)
    config = dataclasses.replace(SHAPES["smollm2-135m"], eos_token_ids=(2,))
    tokenizer = tokenizer_from_gguf(dataclasses.replace(file, metadata=variant(file.metadata, kind)), config)
    properties = {"the first name": {"type": "string", "maxLength": 4}, "n": {"enum": [None, "quite a long word", 5]}}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    options = {"whitespace_flexible": False}
    grammar = LLMatcher.grammar_from_json_schema(schema, overrides=options)  # type: ignore[arg-type]
    grammars = Grammars(tokenizer, config.vocab_size, (2,))
    for seed in range(10):
        guide, data, draw = grammars.guide(grammar), b"", random.Random(seed)
        for _ in range(60):
            token = draw.choice(guide.allowed().nonzero()[0].tolist())
            if token == 2:
                break
            data += tokenizer.token_bytes(token)
            grammars.advance([(guide, token)])
        value = json.loads(data)
        assert list(value) == [*properties] and value["n"] in properties["n"]["enum"]
        assert len(value["the first name"]) <= 4
    text = '{"the first name":"x","n":"quite a long word"}'
    assert b"".join(map(tokenizer.token_bytes, grammars.vocabulary.tokenize_str(text))) == text.encode()
