"""What else runs changes nothing: float32 computes a request to the same bits alone and in a batch, whole and in
chunks, with the prefix cache and without."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from engine.core.build import build_core
from engine.core.loop import EngineCore
from engine.messages import EngineOptions, Request, SamplingParams

Answer = tuple[list[int], list[float]]  # token ids, and their log-probabilities: equal only if the logits are


def core_of(model: Path, **options: Any) -> EngineCore:
    fields = {"dtype": "float32", "kv_cache_tokens": 4096, "enable_prefix_caching": False} | options
    return build_core(EngineOptions(model=str(model), **fields))[0]


def run(core: EngineCore, prompts: list[list[int]], max_tokens: int = 24, **params: Any) -> list[Answer]:
    answers: list[Answer] = [([], []) for _ in prompts]
    for i, prompt in enumerate(prompts):
        settings = SamplingParams(**({"temperature": 0.0, "logprobs": 0, "max_tokens": max_tokens} | params))
        core.add(Request(id=str(i), prompt=prompt, params=settings))
    while core.has_work:
        for output in core.step():
            assert output.error is None, output.error
            answers[int(output.id)][0].extend(output.tokens)
            answers[int(output.id)][1].extend(entry.logprob for entry in output.logprobs or [])
    assert core.stats().blocks_used == 0
    return answers


@pytest.fixture(scope="module")
def model(random_checkpoint: Any) -> Path:
    """Heads of 64 in a group of 3, as in SmolLM2; wide enough that a matmul sums in more than one order."""
    return random_checkpoint(  # type: ignore[no-any-return]
        hidden_size=192, intermediate_size=512, num_attention_heads=6, num_key_value_heads=2, head_dim=64,
        initializer_range=0.08, eos_token_id=None, max_position_embeddings=1024,
    )  # fmt: skip


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    shared = [rng.randrange(2, 512) for _ in range(200)]
    own = [[rng.randrange(2, 512) for _ in range(n)] for n in (1, 5, 64, 65, 130, 300)]
    return [*own, *(shared + tail for tail in own[:4])]


@pytest.fixture(scope="module")
def alone(model: Path, prompts: list[list[int]]) -> list[Answer]:
    core = core_of(model)
    return [run(core, [prompt])[0] for prompt in prompts]


def test_batched_is_alone(model: Path, prompts: list[list[int]], alone: list[Answer]) -> None:
    assert run(core_of(model), prompts) == alone


@pytest.mark.parametrize("budget", [16, 37, 64, 100, 511])
def test_chunked_is_whole(model: Path, prompts: list[list[int]], alone: list[Answer], budget: int) -> None:
    assert run(core_of(model, max_num_batched_tokens=budget), prompts) == alone


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_block_size(model: Path, prompts: list[list[int]], alone: list[Answer], block_size: int) -> None:
    assert run(core_of(model, block_size=block_size), prompts) == alone


def test_prefix_cache(model: Path, prompts: list[list[int]], alone: list[Answer]) -> None:
    core = core_of(model, enable_prefix_caching=True)
    assert run(core, prompts) == alone
    assert run(core, prompts) == alone
    assert core.stats().prefix_hits > 1000


def test_preempted(model: Path, prompts: list[list[int]], alone: list[Answer]) -> None:
    """A pool too small for those that were admitted: some lose their blocks midway and compute them again."""
    core = core_of(model, kv_cache_tokens=400, block_size=16)
    assert run(core, prompts[:4] * 4, 64) == [run(core_of(model), [prompt], 64)[0] for prompt in prompts[:4]] * 4
    assert core.stats().preemptions > 0


def test_seeded_sampling(model: Path, prompts: list[list[int]]) -> None:
    core = core_of(model)
    params = {"temperature": 0.8, "top_p": 0.95, "seed": 7, "frequency_penalty": 0.3}
    separate = [run(core, [prompt], **params)[0] for prompt in prompts]
    assert run(core, prompts, **params) == separate


def test_fast_default_gives_the_same_greedy_text_in_a_batch(smollm2: Path) -> None:
    """--batch-invariant with the fast dtypes, on the real model."""
    core = core_of(smollm2, dtype="auto", batch_invariant=True)
    rng = random.Random(1)
    prompts = [[rng.randrange(100, 40000) for _ in range(n)] for n in (3, 50, 90)]
    separate = [run(core, [prompt], 12)[0] for prompt in prompts]
    assert run(core, prompts, 12) == separate
