"""The CPU's attention over the paged cache against plain float32 attention over gathered keys and values."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu.attention import KEY_TILE, Attention, Span
from kernels.cpu.fused import rope_and_cache_write
from kernels.kv_cache import QMAX

LAYERS, BLOCKS, POISON = 2, 120, 1e4


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int, window: int | None) -> torch.Tensor:
    """q [rows, H, D], the last of `length` positions; k, v [length, Hkv, D] -> [rows, H, D], float64."""
    rows, heads, dim = q.shape
    group = heads // k.shape[1]
    k, v = (x[:length].double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) / dim**0.5
    queries = torch.arange(length - rows, length)[:, None]
    keys = torch.arange(length)
    seen = (keys <= queries) & (keys > queries - (window or length))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@settings(max_examples=60, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 100)), min_size=1, max_size=12),
    shared=st.integers(0, 3),
    decode=st.booleans(),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 3, 4, 7]),
    dim=st.sampled_from([16, 64, 96]),
    block_size=st.sampled_from([16, 64]),
    window=st.sampled_from([None, 1, 20, 64]),
    scattered=st.booleans(),
    invariant=st.booleans(),
    dtypes=st.sampled_from(
        [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
    ),
    seed=st.integers(0, 1000),
)
def test_attention(
    sequences: list[tuple[int, int]],
    shared: int,
    decode: bool,
    kv_heads: int,
    group: int,
    dim: int,
    block_size: int,
    window: int | None,
    scattered: bool,
    invariant: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
    seed: int,
) -> None:
    """`sequences`: rows in the step and positions before them. Pages that belong to none are poisoned.

    shared: blocks that later sequences have in common with the first one, as far as both are longer.
    """
    cache_dtype, dtype = dtypes
    torch.manual_seed(seed)
    cache = torch.full((2 * LAYERS, BLOCKS * block_size + KEY_TILE, kv_heads, dim), POISON, dtype=cache_dtype)
    free = list(range(BLOCKS))
    if scattered:
        random.Random(seed).shuffle(free)
    prefix: list[int] = []
    spans, expected, row, layer = [], [], 0, seed % LAYERS
    q = torch.randn(sum(1 if decode else rows for rows, _ in sequences), kv_heads * group, dim)
    for rows, context in sequences:
        rows = 1 if decode else rows
        length = context + rows
        blocks = prefix[: min(shared, context // block_size)]
        common = len(blocks) * block_size
        blocks = blocks + [free.pop(0) for _ in range(-(-length // block_size) - len(blocks))]
        consecutive = all(b == a + 1 for a, b in itertools.pairwise(blocks))
        prefix = prefix or blocks[: length // block_size]
        positions = torch.arange(length)
        slots = torch.tensor(blocks)[positions // block_size] * block_size + positions % block_size
        kv = torch.randn(2, length, kv_heads, dim).to(cache_dtype)
        kv[:, :common] = cache[2 * layer : 2 * layer + 2, slots[:common]]
        cache[2 * layer : 2 * layer + 2, slots] = kv
        spans.append(Span(row, rows, length, blocks[0] * block_size, None if consecutive else torch.tensor(blocks)))
        expected.append(plain(q[row : row + rows], *kv, length, window))
        row += rows
    attention = Attention(spans, cache, block_size, kv_heads * group, dtype, window, invariant)
    out = attention(q.to(attention.dtype), layer)
    reference = torch.cat(expected).flatten(1)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert out.shape == reference.shape
    assert (out.double() - reference).abs().max() < tolerance * max(1.0, reference.abs().max().item())


@pytest.mark.parametrize("rows", [3, 12])
def test_decode_keeps_nan_where_it_is(rows: int) -> None:
    """Whatever lies in pages of others, and whatever comes of another row, does not reach a row."""
    torch.manual_seed(rows)
    size, heads, kv_heads, dim = 16, 6, 2, 32
    lengths = [17 + 11 * row for row in range(rows)]
    counts = [-(-length // size) for length in lengths]
    free = torch.randperm(2 * sum(counts))
    cache = torch.full((2, 2 * sum(counts) * size + KEY_TILE, kv_heads, dim), torch.nan, dtype=torch.bfloat16)
    spans, expected, q = [], [], torch.randn(rows, heads, dim)
    for row, (length, blocks) in enumerate(zip(lengths, free.split([*counts, sum(counts)]), strict=False)):
        slots = (blocks[:, None] * size + torch.arange(size)).flatten()
        kv = torch.randn(2, length, kv_heads, dim).bfloat16()
        cache[:, slots] = 0  # as CpuBackend.clear leaves them
        cache[:, slots[:length]] = kv
        spans.append(Span(row, 1, length, 0, blocks.clone()))
        expected.append(plain(q[row : row + 1], *kv.float(), length, None))
        if row == 1:
            cache[:, slots[:length]] = torch.nan
    out = Attention(spans, cache, size, heads, torch.float32, None, False)(q, 0).double()
    reference = torch.cat(expected).flatten(1)
    others = [row for row in range(rows) if row != 1]
    torch.testing.assert_close(out[others], reference[others], rtol=1e-5, atol=1e-5)
    assert out[1].isnan().all()


def test_without_llvmlite_torch_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    cache, q = torch.randn(2, 64 + KEY_TILE, 2, 32), torch.randn(3, 6, 32)
    spans = [Span(0, 1, 20, 0, None), Span(1, 2, 40, 0, torch.tensor([3, 0, 1]))]
    gathered = cache.view(2, -1, 16, 2, 32)[:, torch.tensor([3, 0, 1])].flatten(1, 2)
    expected = [plain(q[:1], *cache[:, :20], 20, None), plain(q[1:], *gathered[:, :40], 40, None)]
    monkeypatch.setattr("kernels.cpu.vector.ir", None)
    out = Attention(spans, cache, 16, 6, torch.float32, None, False)(q, 0).double()
    torch.testing.assert_close(out, torch.cat(expected).flatten(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", QMAX)
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("rows", [1, 40])
def test_8_bit_cache(stored: torch.dtype, scattered: bool, rows: int) -> None:
    """What is read is what the 8-bit rows stand for; what is written is within half a step of the rows."""
    torch.manual_seed(0)
    length, block_size, heads, dim, layer = 90, 16, 2, 32, 1
    cache = torch.zeros(4, 8 * block_size, heads, dim).to(stored)
    scales = torch.zeros(4, 8 * block_size, heads, 1)
    blocks = torch.tensor([5, 0, 3, 1, 7, 2] if scattered else [1, 2, 3, 4, 5, 6])
    positions = torch.arange(length)
    slots = blocks[positions // block_size] * block_size + positions % block_size
    qkv = torch.randn(length, (4 + 2 * heads) * dim)
    turns = torch.ones(length, 1, dim // 2, dtype=torch.complex64)
    part = slice(2 * layer, 2 * layer + 2)
    rope_and_cache_write(qkv, turns, 4, heads, cache[part], slots, torch.float32, None, scales[part])
    kv = (cache[part, slots].float() * scales[part, slots]).contiguous()
    given = qkv[:, 4 * dim :].view(length, 2, heads, dim).transpose(0, 1)
    step = scales[part, slots] * (0.5 if stored is torch.int8 else 16)
    assert ((kv - given).abs() <= step * 1.001).all()
    q = torch.randn(rows, 4, dim)
    span = Span(0, rows, length, int(blocks[0]) * block_size, blocks if scattered else None)
    attention = Attention([span], cache, block_size, 4, torch.float32, None, False, scales)
    reference = plain(q, *kv, length, None).flatten(1)
    torch.testing.assert_close(attention(q, layer).double(), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim", [64, 128])
def test_batch_invariant(dim: int) -> None:
    """A query's result has the same bits computed alone, in any chunk, and with scattered blocks."""
    torch.manual_seed(0)
    length, block_size = 900, 64
    blocks = torch.randperm(20)[:15]
    kv = torch.randn(2, length, 2, dim)
    positions = torch.arange(length)
    caches = []
    for table in (torch.arange(15), blocks):
        cache = torch.zeros(2, 24 * block_size, 2, dim)
        cache[:, table[positions // block_size] * block_size + positions % block_size] = kv
        caches.append(cache)
    q = torch.randn(length, 6, dim)

    def chunk(start: int, rows: int, scattered: bool) -> torch.Tensor:
        span = Span(0, rows, start + rows, 0, blocks.clone() if scattered else None)
        attention = Attention([span], caches[scattered], block_size, 6, torch.float32, None, True)
        return attention(q[start : start + rows], 0)

    whole = chunk(0, length, False)
    for start, rows in ((0, 1), (0, 33), (5, 64), (63, 2), (64, 200), (300, 513), (511, 1), (899, 1)):
        for scattered in (False, True):
            assert torch.equal(chunk(start, rows, scattered), whole[start : start + rows]), (start, rows, scattered)
