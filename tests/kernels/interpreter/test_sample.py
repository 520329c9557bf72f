"""Sampling in the interpreter against the plain oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu.philox import gumbel
from kernels.gpu import sample
from kernels.oracle import sample as oracle

V, BLOCK = 1000, 256  # four parts, the last one partly filled
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log", "ignore:invalid value encountered")
PENALTIES = ("presence", "frequency", "repetition")
TRUNCATION = ("top_k", "top_p", "min_p")


def random_logits(rows: int, seed: int, vocab_size: int = V) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def draw(
    logits: torch.Tensor, requests: list[dict[str, Any]], positions: list[int], dtype: torch.dtype = torch.float32
) -> list[int]:
    """The kernel's tokens; request i sits in slot 2 i + 1, the slots between are poisoned."""
    rows, vocab_size = logits.shape
    table = sample.SamplingTable(2 * rows + 1, vocab_size, "cpu", max_bias=8)
    table.floats.fill_(float("nan"))
    table.masks.fill_(-1)
    for i, request in enumerate(requests):
        table.set(2 * i + 1, masked="allowed" in request, **{k: v for k, v in request.items() if k != "allowed"})
    table.set_masks({i: words(request["allowed"]) for i, request in enumerate(requests) if "allowed" in request})
    workspace = sample.SampleWorkspace(rows, vocab_size, "cpu", block=BLOCK)
    workspace.scores.fill_(float("nan"))
    tokens = torch.full((rows,), -7, dtype=torch.int32)
    slots = torch.arange(rows, dtype=torch.int32) * 2 + 1
    sample.sample(logits.to(dtype), slots, torch.tensor(positions), table, tokens, workspace)
    assert not workspace.counters.any()
    return tokens.tolist()


def words(allowed: set[int]) -> Any:
    bits = np.isin(np.arange(-(-V // 32) * 32), list(allowed))
    return np.packbits(bits, bitorder="little").view(np.int32)


def expected(logits: torch.Tensor, request: dict[str, Any], position: int) -> set[int]:
    """What may be drawn: the oracle's token, with float32's freedom where the truncated mass ends."""
    vocab_size = len(logits)
    output, prompt = (torch.tensor(request.get(name, ()), dtype=torch.int64) for name in ("output", "prompt"))
    bias = {t: -float("inf") for t in request.get("banned", ()) if position < request["ban_until"]} | request.get(
        "bias", {}
    )
    scores = oracle.penalise(
        logits,
        output_counts=torch.bincount(output, minlength=vocab_size),
        in_prompt=torch.bincount(prompt, minlength=vocab_size) > 0,
        bias=bias,
        **{name: request[name] for name in PENALTIES if name in request},
    )
    if "allowed" in request:
        scores[~torch.isin(torch.arange(vocab_size), torch.tensor(list(request["allowed"])))] = -float("inf")
    noise = gumbel(vocab_size, request.get("seed", 0), request.get("stream", 0), position)
    truncation = {name: request[name] for name in TRUNCATION if name in request}
    results = set()
    for slack in (-1e-5, 0, 1e-5):
        if "top_p" in truncation:
            truncation["top_p"] = request["top_p"] + slack if request["top_p"] < 1 else 1.0
        results.add(oracle.draw(scores, noise, request["temperature"], **truncation))
    return results


requests = st.fixed_dictionaries(
    {"temperature": st.sampled_from((0.0, 0.3, 1.0, 1.7))},
    optional={
        "top_k": st.sampled_from((1, 2, 5, 50, 999, 5000)),
        "top_p": st.sampled_from((0.05, 0.5, 0.9, 0.999, 1.0)),
        "min_p": st.sampled_from((0.01, 0.2, 1.0)),
        "presence": st.sampled_from((-1.5, 2.0)),
        "frequency": st.sampled_from((-0.5, 1.0)),
        "repetition": st.sampled_from((0.7, 1.3)),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "stream": st.integers(0, 5),
        "bias": st.dictionaries(st.integers(0, V - 1), st.sampled_from((-100.0, 5.0, 100.0)), max_size=4),
        "prompt": st.lists(st.integers(0, V - 1), max_size=30),
        "output": st.lists(st.integers(0, 40), max_size=30),
        "allowed": st.sets(st.integers(0, V - 1), min_size=1, max_size=60),
    },
)


@settings(max_examples=16)
@given(st.lists(requests, min_size=1, max_size=4), st.integers(0, 10_000), st.integers(0, 99))
def test_draws_equal_the_oracles(batch: list[dict[str, Any]], position: int, seed: int) -> None:
    logits = random_logits(len(batch), seed)
    positions = [position + i for i in range(len(batch))]
    got = draw(logits, batch, positions)
    for token, row, request, at in zip(got, logits, batch, positions, strict=True):
        assert token in expected(row, request, at), request


@pytest.mark.parametrize("truncation", ({"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.5}, {"top_k": 20, "top_p": 0.4}))
def test_only_kept_tokens_are_drawn(truncation: dict[str, Any]) -> None:
    """Ten draws from a flat distribution, where the first candidate is mostly one that the truncation drops."""
    logits = random_logits(1, 5, 400).expand(10, 400) / 4
    request = {"temperature": 1.0, **truncation}
    got = draw(logits, [request] * 10, list(range(10)))
    kept = oracle.kept(logits[0], **truncation)
    assert kept[got].all() and len(set(got)) > 1
    assert all(token in expected(logits[0], request, at) for at, token in enumerate(got))


def test_same_draw_alone_and_in_a_batch() -> None:
    batch = [{"temperature": 1.0, "seed": i, "top_p": 0.9} for i in range(4)]
    logits = random_logits(4, 1)
    together = draw(logits, batch, [10, 11, 12, 13])
    assert [draw(logits[i : i + 1], batch[i : i + 1], [10 + i])[0] for i in range(4)] == together
    assert len({draw(logits[:1], [{"temperature": 2.0, "stream": i}], [3])[0] for i in range(5)}) > 1


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.zeros(2, V)
    logits[0, [300, 301, 999]] = 2
    logits[1, [999]] = 2
    assert draw(logits, [{"temperature": 0.0}] * 2, [0, 0]) == [300, 999]
    assert draw(logits, [{"temperature": 0.0, "top_k": 1, "top_p": 0.1}] * 2, [0, 0], torch.bfloat16) == [300, 999]


def test_bans_end_at_their_position() -> None:
    logits = torch.zeros(1, V)
    logits[0, 7], logits[0, 8] = 9, 5
    request = {"temperature": 0.0, "banned": (7,), "ban_until": 4, "bias": {8: 1.0, 9: 5.5}}
    assert [draw(logits, [request], [at])[0] for at in (3, 4)] == [8, 7]


def test_drawn_tokens_are_counted_for_the_penalties() -> None:
    """Frequency penalty: three equal best tokens are drawn in turn."""
    table = sample.SamplingTable(1, V, "cpu")
    table.set(0, temperature=0.0, frequency=0.5, prompt=[4])
    logits = torch.zeros(1, V)
    logits[0, [3, 4, 500]] = 1
    workspace, token = sample.SampleWorkspace(1, V, "cpu", block=BLOCK), torch.empty(1, dtype=torch.int32)
    drawn = []
    for step in range(6):
        sample.sample(logits, torch.zeros(1).int(), torch.tensor([step]), table, token, workspace)
        drawn.append(token.item())
    assert drawn == [3, 4, 500, 3, 4, 500] and table.seen[0, 4] == sample.IN_PROMPT.value + 2


def test_masks() -> None:
    """Every bit of a word, by the row and not by the slot; a mask of one token, of all, of none; rows without."""
    logits = random_logits(36, 4)
    some: list[dict[str, Any]] = [{"temperature": 1.0, "allowed": {700 + bit}} for bit in range(33)]
    some += [{"temperature": 0.0, "allowed": set(range(V))}, {"temperature": 1.0, "allowed": set()}]
    got = draw(logits, [*some, {"temperature": 0.0}], [0] * 36)
    assert got == [*range(700, 733), int(logits[33].argmax()), -1, int(logits[35].argmax())]


def test_a_mask_hides_no_nan() -> None:
    logits = random_logits(2, 4)
    logits[0, 5], logits[1, 5] = float("nan"), float("inf")
    assert draw(logits, [{"temperature": 0.0, "allowed": {7}}] * 2, [0, 0]) == [-1, -1]


def test_padded_and_broken_rows() -> None:
    logits = random_logits(4, 2)
    logits[1, 600], logits[2], logits[3] = float("nan"), float("inf"), -float("inf")
    table = sample.SamplingTable(4, V, "cpu")
    for slot in range(4):
        table.set(slot, temperature=1.0, top_p=0.9)
    tokens = torch.full((5,), -7, dtype=torch.int32)
    workspace = sample.SampleWorkspace(4, V, "cpu", block=BLOCK)
    slots = torch.tensor([-1, 1, 2, 3])
    sample.sample(logits, slots, torch.zeros(4).int(), table, tokens[:4], workspace)
    assert tokens.tolist() == [0, -1, -1, -1, -7]


@settings(max_examples=10)
@given(
    rows=st.integers(1, 3),
    n=st.sampled_from((0, 1, 5, 20)),
    vocab_size=st.sampled_from((20, 256, 1000)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=st.integers(0, 9),
)
def test_logprobs(rows: int, n: int, vocab_size: int, dtype: torch.dtype, seed: int) -> None:
    logits = random_logits(rows, seed, vocab_size).to(dtype)
    logits[:, :4] = logits[:, 10:14]  # ties
    tokens = torch.randint(0, vocab_size, (rows,), generator=torch.Generator().manual_seed(seed))
    out, top_logprobs = torch.full((rows,), float("nan")), torch.full((rows, n), float("nan"))
    ranks, top_tokens = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, n, dtype=torch.int32)
    sample.logprobs(logits, tokens, out, ranks, top_tokens, top_logprobs, block=BLOCK)
    for i in range(rows):
        logprob, rank, top = oracle.logprobs(logits[i], int(tokens[i]), n)
        assert abs(out[i] - logprob) < 1e-5 and ranks[i] == rank
        assert top_tokens[i].tolist() == [token for token, _ in top]
        torch.testing.assert_close(top_logprobs[i], torch.tensor([value for _, value in top]), rtol=0, atol=1e-5)
