"""Attention over the paged cache, beside SDPA's backends and FlexAttention on contiguous keys and values."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.kernel_cases import FLEX, Case
from bench.operations import Operation, Place, Rounding, add_baseline
from bench.timing import Call, copies
from kernels import kv_cache
from kernels.gpu import attention
from kernels.kv_cache import KVCache
from kernels.oracle import attention as oracle

BACKENDS = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
CHECKED_SEQUENCES, CHECKED_ROWS = 8, 32  # the oracle looks at so many, each sequence's last rows


def decode(case: Case, place: Place) -> Operation:
    shape, lens = case.shape, torch.tensor(case.kv_lens, dtype=torch.int32, device=place.device)
    pages = Pages(case, place)
    longest = pages.table.shape[1] * case.block_size
    workspace = attention.decode_workspace(
        len(case.kv_lens), shape.heads, shape.kv_heads, shape.head_dim, longest, place.device
    )

    def call(i: int) -> None:
        attention.decode(
            pages.q[i], pages.caches[i], pages.table, lens, pages.out, workspace,
            scale=shape.head_dim**-0.5, window=case.window, tile=place.tile,
        )  # fmt: skip

    operation = pages.operation([functools.partial(call, i) for i in range(len(pages.caches))])
    if len(set(case.kv_lens)) == 1 and not case.window:
        for name, backend in BACKENDS.items():
            build = functools.partial(_sdpa, case, place, pages.dtype, backend)
            add_baseline(operation, place, name, build)
    return operation


def prefill(case: Case, place: Place) -> Operation:
    lens = torch.tensor(case.kv_lens, dtype=torch.int32, device=place.device)
    pages = Pages(case, place)
    cu_q = torch.tensor(pages.starts, dtype=torch.int32, device=place.device)

    def call(i: int) -> None:
        attention.prefill(
            pages.q[i], pages.caches[i], pages.table, cu_q, lens, pages.out,
            max_q=max(case.q_lens), scale=case.shape.head_dim**-0.5, window=case.window, tile=place.tile,
        )  # fmt: skip

    operation = pages.operation([functools.partial(call, i) for i in range(len(pages.caches))])
    if len(case.q_lens) == 1 and case.q_lens == case.kv_lens and not case.window:
        for name, backend in BACKENDS.items():
            add_baseline(operation, place, name, functools.partial(_sdpa, case, place, pages.dtype, backend))
        if place.device.type == "cuda" and (place.flex or case == FLEX):
            add_baseline(operation, place, "flex", lambda: _flex(case, place, pages.dtype))
    return operation


class Pages:
    """Queries and shuffled pages of all sequences, several times over; one output."""

    def __init__(self, case: Case, place: Place) -> None:
        self.case, shape, cache_dtype = case, case.shape, getattr(torch, case.dtype)
        self.dtype = torch.bfloat16 if cache_dtype in kv_cache.QMAX else cache_dtype
        self.cost = attention.bytes_and_flops(
            case.q_lens, case.kv_lens, shape.heads, shape.kv_heads, shape.head_dim, self.dtype, cache_dtype, case.window
        )
        needed = [-(-n // case.block_size) for n in case.kv_lens]
        blocks = sum(needed) + 1
        order = torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(0)).int() + 1
        table = torch.zeros(len(needed), max(needed), dtype=torch.int32)
        for row, own in zip(table, order.split(needed), strict=True):
            row[: len(own)] = own
        self.table = table.to(place.device)
        sets = copies(self.cost[0], place.cache_bytes, 64)
        self.caches = [random_cache(case, blocks, place, seed) for seed in range(sets)]
        self.q = place.normal(sets, case.rows, shape.heads, shape.head_dim, dtype=self.dtype, seed=9)
        self.out = torch.empty_like(self.q[0])
        self.starts = [sum(case.q_lens[:i]) for i in range(len(case.q_lens) + 1)]

    def operation(self, calls: list[Call]) -> Operation:
        compute = torch.float16 if self.dtype == torch.float16 else torch.bfloat16
        rate = "float32" if self.dtype == torch.float32 else str(compute).removeprefix("torch.")
        return Operation(calls, *self.cost, rate, functools.partial(self._error, calls[0]))

    def _error(self, call: Call) -> tuple[float, float]:
        """Of the last rows of each sequence. Allowed: twice what the same mathematics loses in torch at the kernel's
        precision, plus rounding."""
        self.out.fill_(float("nan"))
        call()
        # Absolute: the squares of all sequences' deviations add up.
        error = allowed = norm = 0.0
        for b in range(min(len(self.case.kv_lens), CHECKED_SEQUENCES)):
            stop = self.starts[b + 1]
            first = max(self.starts[b], stop - CHECKED_ROWS)
            got = self.out[first:stop].cpu().float()
            exact, narrow = self._expected(b, first, stop)
            error += (got - exact).square().sum().item()
            allowed += (narrow - exact).square().sum().item()
            norm += exact.square().sum().item()
        slack = Rounding[self.dtype] + 2e-6
        return (error / norm) ** 0.5, 2 * (allowed / norm) ** 0.5 + slack

    def _expected(self, b: int, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        case, n = self.case, self.case.kv_lens[b]
        if n == 0:  # a padded row
            zeros = torch.zeros(stop - first, *self.out.shape[1:])
            return zeros, zeros
        blocks = self.table[b, : -(-n // case.block_size)].long()
        cache = self.caches[0]
        scales = (None if x is None else x[blocks].cpu() for x in (cache.k_scale, cache.v_scale))
        of_it = KVCache(_rows_of(cache.k, blocks), _rows_of(cache.v, blocks), *scales)
        table = torch.arange(len(blocks), dtype=torch.int32)[None]
        cu_q, lens = torch.tensor([0, stop - first]), torch.tensor([n])
        compute = torch.float16 if cache.quantized else cache.k.dtype
        q, scale = self.q[0, first:stop].cpu(), case.shape.head_dim**-0.5
        exact, narrow = (
            oracle.attention(q, of_it, table, cu_q, lens, scale, case.window, c) for c in (torch.float32, compute)
        )
        return exact, narrow


def _rows_of(pages: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Some pages, on the CPU. As bytes: not every torch can index float8."""
    return pages.view(torch.uint8)[blocks].cpu().view(pages.dtype)


def random_cache(case: Case, blocks: int, place: Place, seed: int) -> KVCache:
    """Pages of normal numbers, filled in place: large caches have no room for a second copy in float32."""
    dtype, rng = getattr(torch, case.dtype), place.generator(seed)
    cache = kv_cache.allocate(
        blocks, case.shape.kv_heads, case.block_size, case.shape.head_dim, dtype, place.device
    )  # fmt: skip
    for page in (cache.k, cache.v):
        if dtype is torch.int8:
            page.random_(-127, 128, generator=rng)
        elif dtype in kv_cache.QMAX:
            for rows in page.split(max(1, (1 << 26) // page[0].numel())):
                rows.copy_(torch.randn(rows.shape, device=place.device, generator=rng).mul_(100).clamp_(-448, 448))
        else:
            page.normal_(generator=rng)
    for scale in (cache.k_scale, cache.v_scale):
        if scale is not None:
            scale.uniform_(0.005, 0.02, generator=rng)
    return cache


def _contiguous(case: Case, place: Place, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """q [B, heads, T, D] and k, v [B, kv_heads, N, D], several sets larger than the cache together."""
    shape, batch = case.shape, len(case.kv_lens)
    n, rows = case.kv_lens[0], case.q_lens[0]
    one = 2 * batch * shape.kv_heads * n * shape.head_dim * dtype.itemsize
    sets = copies(one, place.cache_bytes, 64)
    return [
        (
            place.normal(batch, shape.heads, rows, shape.head_dim, dtype=dtype, seed=seed),
            place.normal(batch, shape.kv_heads, n, shape.head_dim, dtype=dtype, seed=seed + 100),
            place.normal(batch, shape.kv_heads, n, shape.head_dim, dtype=dtype, seed=seed + 200),
        )
        for seed in range(sets)
    ]


def _sdpa(case: Case, place: Place, dtype: torch.dtype, backend: SDPBackend) -> list[Call]:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)

    return [functools.partial(call, *inputs) for inputs in _contiguous(case, place, dtype)]


def _flex(case: Case, place: Place, dtype: torch.dtype) -> list[Call]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n = case.kv_lens[0]
    mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, n, n, device=place.device)
    compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention, dynamic=False)
    inputs = _contiguous(case, place, dtype)
    return [functools.partial(compiled, q, k, v, block_mask=mask, enable_gqa=True) for q, k, v in inputs]
