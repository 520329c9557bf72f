"""Attention kernels against the float32 oracle: NaN in foreign pages, and in own ones behind a sequence's end."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import kv_cache
from kernels.gpu import attention
from kernels.gpu.tiles import H100
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
        if n % block_size:  # stale rows, as a request leaves them whose output was not finite
            k[own[-1], :, n % block_size :] = NAN
            v[own[-1], :, n % block_size :] = NAN
    pages = kv_cache.pack(k, v, cache)
    if cache == torch.float8_e4m3fn:  # the kernel that writes them leaves NaN in scales alone
        for tensor in (pages.k, pages.v):
            tensor.view(torch.uint8)[tensor.float().isnan()] = 0x55
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
@settings(max_examples=4)
@given(st.lists(LENGTHS, min_size=1, max_size=3), st.fixed_dictionaries(SHAPES), SPLITS)
def test_decode_matches_oracle(group, cache, lens, shape, splits):
    case = make([1] * len(lens), lens, group=group, cache=cache, **shape)
    assert_close(run_decode(case, splits), case)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("cache", CACHES, ids=str)
@settings(max_examples=4)
@given(
    st.lists(st.tuples(st.integers(1, 45), st.integers(0, 150)), min_size=1, max_size=3), st.fixed_dictionaries(SHAPES)
)
def test_prefill_matches_oracle(group, cache, lens, shape):
    q_lens = [new for new, _ in lens]
    case = make(q_lens, [new + cached for new, cached in lens], group=group, cache=cache, **shape)
    assert_close(run_prefill(case), case)


@pytest.mark.parametrize("group", [3, 7])
def test_leftover_rows_of_a_tile_are_not_stored(group):
    """A group that does not divide the tile's rows leaves some that belong to the next tile's first query. They do not
    see that query's own key when it begins a tile of keys, as it does here."""
    tile = attention.prefill_config(group, 1, 64, 64, torch.float16, H100)
    positions = tile.block_m // group
    context = -positions % tile.block_n
    case = make([positions + 1], [context + positions + 1], group=group)
    assert_close(run_prefill(case), case)


def test_pages_may_lie_anywhere():
    """The same sequences in other blocks give the same bits; make() places them by seed, so they are moved here."""
    case = make([5, 1], [70, 131], group=3, block_size=16, cache=torch.bfloat16)
    used = case.block_table[case.block_table >= 0].long()
    target = used[torch.randperm(len(used), generator=torch.Generator().manual_seed(1))]
    moved = dataclasses.replace(case, cache=KVCache(case.cache.k.clone(), case.cache.v.clone()))
    moved.cache.k[target], moved.cache.v[target] = case.cache.k[used], case.cache.v[used]
    renamed = torch.full((int(used.max()) + 1,), -1, dtype=torch.int32)
    renamed[used] = target.int()
    moved.block_table = torch.where(case.block_table >= 0, renamed[case.block_table.clamp(min=0).long()], -1)
    assert not torch.equal(moved.block_table, case.block_table)
    assert torch.equal(run_prefill(moved), run_prefill(case))
    case.q = moved.q = case.q[:2]
    assert torch.equal(run_decode(moved, attention.Splits(2, 128)), run_decode(case, attention.Splits(2, 128)))


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.int8], ids=str)
def test_split_count_changes_rounding_only(cache):
    case = make([1] * 3, [600, 129, 40], group=4, cache=cache)
    whole = run_decode(case, attention.Splits(1, 128))
    for count in (2, 3, 5):
        split = run_decode(case, attention.Splits(count, 128))
        assert (split - whole).float().norm() <= 2 * torch.finfo(whole.dtype).eps * whole.float().norm()
        assert torch.equal(split[2], whole[2])  # too short for two parts


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_row_of_a_batch_equals_the_row_alone(cache):
    lens, splits = [200, 17, 300], attention.Splits(3, 128)
    case = make([1] * 3, lens, group=3, kv_heads=2, cache=cache, window=150)
    together = run_decode(case, splits)
    for b in range(3):
        one = slice(b, b + 1)
        alone = dataclasses.replace(
            case, q=case.q[one], block_table=case.block_table[one], kv_len=case.kv_len[one], cu_q=case.cu_q[:2]
        )
        assert torch.equal(run_decode(alone, splits)[0], together[b])
    q_lens = [9, 40, 3]
    case = make(q_lens, [50, 40, 130], group=3, kv_heads=2, cache=cache, window=45)
    together = run_prefill(case)
    for b, (start, stop) in enumerate(zip(case.cu_q.tolist(), case.cu_q.tolist()[1:], strict=False)):
        one = slice(b, b + 1)
        alone = dataclasses.replace(
            case,
            q=case.q[start:stop],
            block_table=case.block_table[one],
            kv_len=case.kv_len[one],
            cu_q=torch.tensor([0, stop - start], dtype=torch.int32),
        )
        assert torch.equal(run_prefill(alone), together[start:stop])


def test_prefill_in_chunks_equals_prefill_at_once():
    """The second chunk sees the first through the cache. Float32: what differs is where the tiles begin."""
    case = make([50], [50], group=3, cache=torch.float32)
    whole = run_prefill(case)
    case.q, case.cu_q = case.q[31:], torch.tensor([0, 19], dtype=torch.int32)
    torch.testing.assert_close(run_prefill(case), whole[31:], rtol=0, atol=2e-6)


def test_decode_equals_prefill_of_one_token():
    case = make([1] * 3, [64, 65, 1], group=4, cache=torch.bfloat16)
    decoded, prefilled = run_decode(case, attention.Splits(2, 128)), run_prefill(case)
    assert (decoded - prefilled).float().norm() <= torch.finfo(torch.bfloat16).eps * prefilled.float().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_padded_row_is_zero(dtype):
    case = make([1, 1], [70, 64], group=3, cache=dtype)
    case.kv_len[1] = 0
    case.block_table[1] = 0  # what a padded row points at is not read
    out = run_decode(case, attention.Splits(2, 128))
    assert (out[1] == 0).all() and not out[0].isnan().any()


def test_default_splits_and_workspace():
    """Without `splits` the wrapper chooses; decode_workspace has room for every batch up to the largest."""
    case = make([1] * 3, [700, 300, 1], group=4, kv_heads=2, cache=torch.float16)
    max_len = case.block_table.shape[1] * 64
    workspace = attention.decode_workspace(3, 8, 2, 64, max_len, torch.device("cpu"))
    out = torch.full_like(case.q, NAN)
    attention.decode(case.q, case.cache, case.block_table, case.kv_len, out, workspace, scale=case.scale)
    assert_close(out, case)
    assert attention.decode_splits(3, 2, max_len, H100).count > 1


def test_error_of_8_bit_pages():
    """Quantising keys and values costs what 8 bits cost, and pack and unpack are inverses up to that."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(3, 2, 16, 64, generator=generator) for _ in range(2))
    for dtype, error in ((torch.int8, 0.012), (torch.float8_e4m3fn, 0.04), (torch.float32, 0.0)):
        for original, back in zip((k, v), kv_cache.unpack(kv_cache.pack(k, v, dtype)), strict=True):
            assert (back - original).norm() <= error * original.norm()
