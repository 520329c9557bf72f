"""Attention kernels against the float32 oracle: NaN in foreign pages, stale values behind every sequence's end."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import kv_cache
from kernels.gpu import attention
from kernels.kv_cache import KVCache
from kernels.oracle import attention as oracle

GROUPS = (1, 3, 4, 7, 8)
CACHES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
NAN = float("nan")


@dataclasses.dataclass
class Case:
    """Sequences in a cache: pages that no sequence owns are NaN where they can be."""

    q: torch.Tensor
    cache: KVCache
    block_table: torch.Tensor
    cu_q: torch.Tensor
    kv_len: torch.Tensor
    scale: float
    window: int = 0

    @property
    def max_q(self) -> int:
        return int(self.cu_q.diff().max())


def make(
    q_lens: list[int],
    kv_lens: list[int],
    *,
    group: int,
    kv_heads: int = 1,
    head_dim: int = 64,
    block_size: int = 64,
    cache: torch.dtype = torch.float16,
    q: torch.dtype | None = None,
    window: int = 0,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-n // block_size) for n in kv_lens]
    blocks = sum(needed) + 3
    k, v = (torch.randn(blocks, kv_heads, block_size, head_dim, generator=generator) for _ in range(2))
    order = (torch.randperm(blocks - 1, generator=generator) + 1).tolist()  # page 0 belongs to nobody
    table = torch.full((len(kv_lens), max(needed) + 1), -1, dtype=torch.int32)
    for b, n in enumerate(kv_lens):
        own = [order.pop() for _ in range(needed[b])]
        table[b, : len(own)] = torch.tensor(own, dtype=torch.int32) - 1
        if n % block_size:  # stale rows: finite, as pages always are, and large enough to be seen
            k[own[-1], :, n % block_size :] *= 8
            v[own[-1], :, n % block_size :] = 300.0
    pages = kv_cache.pack(k, v, cache)
    for tensor in (pages.k, pages.v, pages.k_scale, pages.v_scale):
        if tensor is not None and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16):
            tensor[[0, *order]] = NAN
    inner = [None if x is None else x[1:] for x in (pages.k, pages.v, pages.k_scale, pages.v_scale)]
    assert inner[0] is not None and inner[1] is not None
    heads = group * kv_heads
    wide = torch.randn(
        sum(q_lens), heads + 2 * kv_heads, head_dim, generator=generator
    )  # as one matmul makes q, k and v
    q = q or (torch.bfloat16 if cache in kv_cache.QMAX else cache)
    return Case(
        wide.to(q)[:, :heads],
        KVCache(inner[0], inner[1], inner[2], inner[3]),
        table,
        torch.tensor([0, *q_lens]).cumsum(0).int(),
        torch.tensor(kv_lens, dtype=torch.int32),
        head_dim**-0.5,
        window,
    )


def expected(case: Case, compute: torch.dtype = torch.float32) -> torch.Tensor:
    return oracle.attention(
        case.q, case.cache, case.block_table, case.cu_q, case.kv_len, case.scale, case.window, compute
    )


def poisoned(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """A NaN output with rows of 7 before and after it: (the whole buffer, the output)."""
    buffer = torch.full((len(case.q) + 2, *case.q.shape[1:]), 7.0, dtype=case.q.dtype)
    buffer[1:-1] = NAN
    return buffer, buffer[1:-1]


def run_decode(case: Case, splits: attention.Splits | None = None) -> torch.Tensor:
    batch, heads, head_dim = case.q.shape
    kv_heads = case.cache.k.shape[1]
    parts = splits.count if splits else attention.MAX_SPLITS
    workspace = attention.DecodeWorkspace(
        torch.full((batch * heads * parts * head_dim,), NAN),
        torch.full((batch * heads * parts,), NAN),
        torch.zeros(batch * kv_heads, dtype=torch.int32),
    )
    buffer, out = poisoned(case)
    for _ in range(
        2 if splits and splits.count > 1 else 1
    ):  # the second call finds the counters as the first left them
        attention.decode(
            case.q, case.cache, case.block_table, case.kv_len, out, workspace,
            scale=case.scale, window=case.window, splits=splits,
        )  # fmt: skip
        assert not workspace.arrived.any()
    assert (buffer[0] == 7).all() and (buffer[-1] == 7).all()
    return out


def run_prefill(case: Case) -> torch.Tensor:
    buffer, out = poisoned(case)
    attention.prefill(
        case.q, case.cache, case.block_table, case.cu_q, case.kv_len, out,
        max_q=case.max_q, scale=case.scale, window=case.window,
    )  # fmt: skip
    assert (buffer[0] == 7).all() and (buffer[-1] == 7).all()
    return out


def assert_close(out: torch.Tensor, case: Case) -> None:
    """At most twice the error of the same mathematics in torch at that precision, and rounding: of the output, and of
    float32 sums and exponentials."""
    exact = expected(case)
    compute = torch.float16 if case.cache.quantized else case.cache.k.dtype
    rounding = (torch.finfo(out.dtype).eps + 2e-6) * exact.norm()
    allowed = 2 * (expected(case, compute) - exact).norm() + rounding
    error = (out.float() - exact).norm()  # NaN fails
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


SHAPES = {
    "kv_heads": st.integers(1, 2),
    "head_dim": st.sampled_from([64, 96, 128]),
    "block_size": st.sampled_from([16, 32, 64, 128]),
    "window": st.sampled_from([0, 0, 1, 30, 100]),
    "seed": st.integers(0, 99),
}
LENGTHS = st.one_of(st.integers(1, 330), st.sampled_from([63, 64, 65, 128, 129]))
SPLITS = st.builds(attention.Splits, st.integers(1, 4), st.sampled_from([128, 256]))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("cache", CACHES, ids=str)
@settings(max_examples=5)
@given(st.lists(LENGTHS, min_size=1, max_size=3), st.fixed_dictionaries(SHAPES), SPLITS)
def test_decode_matches_oracle(group, cache, lens, shape, splits):
    case = make([1] * len(lens), lens, group=group, cache=cache, **shape)
    assert_close(run_decode(case, splits), case)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("cache", CACHES, ids=str)
@settings(max_examples=5)
@given(
    st.lists(st.tuples(st.integers(1, 45), st.integers(0, 150)), min_size=1, max_size=3), st.fixed_dictionaries(SHAPES)
)
def test_prefill_matches_oracle(group, cache, lens, shape):
    q_lens = [new for new, _ in lens]
    case = make(q_lens, [new + cached for new, cached in lens], group=group, cache=cache, **shape)
    assert_close(run_prefill(case), case)
