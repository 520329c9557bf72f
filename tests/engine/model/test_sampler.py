"""The sampler against kernels.oracle.sample, which spells out penalties, truncation and draw with a sort."""

from __future__ import annotations

import math
from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.messages import Request, SamplingParams
from engine.model.sampler import Sampler, token_logprobs
from engine.scheduling.sequence import Sequence
from kernels.oracle import sample as oracle

EOS = 3


def sequence(params: SamplingParams, prompt: list[int], generated: list[int], id: str = "a") -> Sequence:
    request = Request(id=id, prompt=prompt, params=params)
    return Sequence(request, 0, len(prompt), 4096, 4096, frozenset({EOS}), prompt + generated)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 100, 5000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.9]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, -0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([{}, {5: 4.0, 17: -100.0}]),
    seed=st.integers(-(2**63), 2**63 - 1),
    stream=st.integers(0, 15),
)


@settings(max_examples=150, deadline=None)
@given(
    params=PARAMS, vocab=st.sampled_from([50, 3001]), spread=st.sampled_from([0.5, 3.0, 12.0]), seed=st.integers(0, 99)
)
def test_equals_oracle(params: SamplingParams, vocab: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab, generator=generator) * spread
    prompt, generated = [1, 5, 5, 20], [7, 7, 9]
    counts = torch.bincount(torch.tensor(generated), minlength=vocab)
    scores = oracle.penalise(
        logits,
        output_counts=counts,
        in_prompt=torch.bincount(torch.tensor(prompt), minlength=vocab) > 0,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        repetition=params.repetition_penalty,
        bias=params.logit_bias,
    )
    assert params.seed is not None
    noise = oracle.gumbel(vocab, params.seed, params.stream, len(prompt + generated)) if params.temperature else logits
    expected = oracle.draw(
        scores, noise, params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p
    )
    before = logits.clone()
    assert Sampler((EOS,), 0).sample(logits[None], [sequence(params, prompt, generated)]) == [expected]
    assert torch.equal(logits, before)


def test_frequencies() -> None:
    """4,000 draws fit the distribution: chi-square with 7 degrees of freedom under its 1e-6 quantile."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, -3.0]])
    sampler, counts, draws = Sampler((), 0), Counter[int | None](), 4_000
    for i in range(draws):
        params = SamplingParams(temperature=1.0, seed=i)
        counts[sampler.sample(logits, [sequence(params, [0], [])])[0]] += 1
    expected = logits[0].softmax(0) * draws
    assert sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected.tolist())) < 42


def test_rows_are_independent() -> None:
    """A row's token does not depend on its place in the batch, nor on whether the request brought a seed."""
    logits = torch.randn(6, 500) * 2
    rows = [sequence(SamplingParams(temperature=1.0, seed=s), [1], [2], str(i)) for i, s in enumerate([1, None, 2] * 2)]
    together = Sampler((), 0).sample(logits, rows)
    assert together == [Sampler((), 0).sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]


def test_seed_and_stream_and_position_change_the_draw() -> None:
    logits = torch.zeros(1, 1000)

    def draw(seed: int, stream: int, length: int) -> int | None:
        params = SamplingParams(temperature=1.0, seed=seed, stream=stream)
        return Sampler((), 0).sample(logits, [sequence(params, [0] * length, [])])[0]

    assert draw(1, 0, 5) == draw(1, 0, 5)
    assert len({draw(1, 0, 5), draw(2, 0, 5), draw(1, 1, 5), draw(1, 0, 6)}) == 4


def test_min_tokens_holds_back_eos_and_stop_tokens() -> None:
    logits = torch.zeros(1, 10)
    logits[0, EOS], logits[0, 8], logits[0, 6] = 9.0, 8.0, 7.0
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(8,))
    sampler = Sampler((EOS,), 0)
    assert sampler.sample(logits, [sequence(params, [0], [1])]) == [6]
    assert sampler.sample(logits, [sequence(params, [0], [1, 1])]) == [EOS]


def test_penalties_follow_the_sequence() -> None:
    """The counts kept between steps are those of the tokens."""
    params = SamplingParams(temperature=0.0, frequency_penalty=1.0)
    sampler, row = Sampler((), 0), sequence(params, [0], [])
    logits = torch.tensor([[3.0, 2.5, 1.9, 0.0]])
    tokens = []
    for _ in range(6):
        token = sampler.sample(logits, [row])[0]
        assert token is not None
        tokens.append(token)
        row.tokens.append(token)
    assert tokens == [0, 1, 0, 2, 1, 0]


def test_not_finite() -> None:
    logits = torch.zeros(3, 8)
    logits[1, 2] = math.nan
    logits[2, 4] = math.inf
    rows = [sequence(SamplingParams(temperature=0.0), [0], [], str(i)) for i in range(3)]
    assert Sampler((), 0).sample(logits, rows) == [0, None, None]


def test_token_logprobs() -> None:
    logits = torch.randn(3, 40)
    for row, entry in enumerate(token_logprobs(logits, [4, 39, 0], [0, 5, 20])):
        logprob, rank, top = oracle.logprobs(logits[row], entry.token, [0, 5, 20][row])
        assert abs(entry.logprob - logprob) < 1e-5 and entry.rank == rank
        assert [id for id, _ in entry.top] == [id for id, _ in top]
        assert all(abs(a[1] - b[1]) < 1e-5 for a, b in zip(entry.top, top, strict=True))
