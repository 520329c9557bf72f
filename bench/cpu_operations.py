"""The operations of the CPU path, each beside plain torch for the same work and its float32 oracle.

A decode step goes through the weights of every layer before it returns to the first, so each linear has as many copies
as the model has layers.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from bench.kernel_cases import Case
from bench.operations import Operation, Place, Prepare, Rounding, add_baseline, elementwise, largest, relative
from bench.timing import Call
from kernels.cpu import fused
from kernels.cpu.attention import Attention, Span
from kernels.cpu.linear import Linear, Plan
from kernels.cpu.philox import gumbel
from kernels.formats import decode, dequantize
from kernels.oracle import fused as fused_oracle

EVERY_ROW = 1 << 30


def prepare(case: Case, place: Place) -> Operation:
    return OPERATIONS[case.kernel](case, place)


def linear(case: Case, place: Place) -> Operation:
    """dtype: "Q4_1", 4-bit blocks as they are in the file, or that of a packed dense copy of the same weights."""
    n, k = case.shape.linears[case.layer]
    four_bit = case.dtype == "Q4_1"
    dtype = torch.bfloat16 if four_bit else getattr(torch, case.dtype)
    plan = Plan(dtype, dtype, EVERY_ROW if four_bit else 0, four_bit, False)
    weights = [decode("Q4_1", {"": _q4_1(n, k, seed)}) for seed in range(case.shape.layers)]
    linears = [Linear(weight, None, plan) for weight in weights]
    x = place.normal(case.rows, k, dtype=dtype)

    def error() -> tuple[float, float]:
        """Allowed: 8 bits of mantissa in weights and sums of bfloat16, 4-bit scales among them; 11 in float16."""
        allowed = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
        return relative(linears[0](x), x.float() @ dequantize(weights[0]).t()), allowed

    weight_bytes = weights[0].bytes if four_bit else n * k * dtype.itemsize
    cost = weight_bytes + case.rows * (n + k) * dtype.itemsize, 2 * case.rows * n * k
    calls: list[Call] = [functools.partial(weight, x) for weight in linears]
    operation = Operation(calls, *cost, str(dtype).removeprefix("torch."), error)

    def plain(other: torch.dtype) -> list[Call]:
        x_other = x.to(other)
        return [functools.partial(F.linear, x_other, dequantize(w, other)) for w in weights]

    for other in dict.fromkeys((dtype, torch.float32)):
        name = f"F.linear {str(other).removeprefix('torch.')}"
        add_baseline(operation, place, name, functools.partial(plain, other))
    return operation


def _q4_1(n: int, k: int, seed: int) -> torch.Tensor:
    """uint8 [N, K/32 * 20]: blocks of fp16 scale, fp16 minimum and 16 bytes of nibbles, all random."""
    rng = torch.Generator().manual_seed(seed)
    d = 0.005 + 0.01 * torch.rand(n, k // 32, generator=rng)
    head = torch.stack([d, -7.5 * d + 0.01 * torch.randn(d.shape, generator=rng)], -1).half().view(torch.uint8)
    nibbles = torch.randint(0, 256, (n, k // 32, 16), dtype=torch.uint8, generator=rng)
    return torch.cat([head, nibbles], -1).flatten(1)


def attention(case: Case, place: Place) -> Operation:
    """Sequences in consecutive blocks, as the block pool lays them out; every layer has a cache of its own."""
    shape, dtype = case.shape, getattr(torch, case.dtype)
    slots = [-(-n // case.block_size) * case.block_size for n in case.kv_lens]
    caches = place.normal(2 * shape.layers, sum(slots), shape.kv_heads, shape.head_dim).to(dtype)
    spans = [
        Span(sum(case.q_lens[:b]), rows, n, sum(slots[:b]), None)
        for b, (rows, n) in enumerate(zip(case.q_lens, case.kv_lens, strict=True))
    ]
    step = Attention(spans, caches, case.block_size, shape.heads, dtype, None, False)
    q = place.normal(case.rows, shape.heads, shape.head_dim, dtype=dtype, seed=1)

    def plain(layer: int, compute: torch.dtype) -> torch.Tensor:
        """One sequence after another, keys and values repeated for each query head."""
        parts = []
        for span in spans:
            k, v = caches[2 * layer : 2 * layer + 2, span.first : span.first + span.length].to(compute)
            k, v = (t.transpose(0, 1).repeat_interleave(shape.heads // shape.kv_heads, 0)[None] for t in (k, v))
            rows = q[span.row : span.row + span.rows].to(compute).transpose(0, 1)[None]
            y = F.scaled_dot_product_attention(rows, k, v, is_causal=span.rows > 1)
            parts.append(y[0].transpose(0, 1))
        return torch.cat(parts).flatten(1)

    def error() -> tuple[float, float]:
        return relative(step(q, 0), plain(0, torch.float32)), 2 * Rounding[dtype] + 2e-6

    io = 2 * q.nbytes + 2 * sum(case.kv_lens) * shape.kv_heads * shape.head_dim * dtype.itemsize
    pairs = sum(rows * n - rows * (rows - 1) // 2 for rows, n in zip(case.q_lens, case.kv_lens, strict=True))
    flops = 4 * pairs * shape.heads * shape.head_dim
    calls: list[Call] = [functools.partial(step, q, layer) for layer in range(shape.layers)]
    operation = Operation(calls, io, flops, case.dtype, error)
    baseline = [functools.partial(plain, layer, dtype) for layer in range(shape.layers)]
    add_baseline(operation, place, "torch eager", lambda: baseline)
    return operation


def add_rmsnorm(case: Case, place: Place) -> Operation:
    m, h, dtype = case.rows, case.shape.hidden, getattr(torch, case.dtype)
    residual, delta, weight = (place.normal(*size, seed=s) for s, size in enumerate(((m, h), (m, h), (h,))))
    delta, scaled = delta.to(dtype), fused.norm_weight(weight)

    def error() -> tuple[float, float]:
        exact = fused_oracle.add_rmsnorm(delta, residual, weight, 1e-5)[1]
        return elementwise(fused.add_rmsnorm(residual.clone(), delta, scaled, 1e-5, dtype), exact)

    def eager() -> torch.Tensor:
        residual.add_(delta)
        return F.rms_norm(residual, (h,), weight, 1e-5).to(dtype)

    call = functools.partial(fused.add_rmsnorm, residual, delta, scaled, 1e-5, dtype)
    operation = Operation([call], m * h * (8 + 2 * dtype.itemsize) + 4 * h, 5 * m * h, "float32", error)
    add_baseline(operation, place, "torch eager", lambda: [eager])
    return operation


def silu_mul(case: Case, place: Place) -> Operation:
    m, inner, dtype = case.rows, case.shape.intermediate, getattr(torch, case.dtype)
    gate_up = place.normal(m, 2 * inner, dtype=dtype)

    def error() -> tuple[float, float]:
        """silu is rounded before the product: two roundings."""
        return relative(fused.silu_mul(gate_up), fused_oracle.silu_mul(gate_up)), 2 * Rounding[dtype]

    def eager() -> torch.Tensor:
        return F.silu(gate_up[:, :inner]) * gate_up[:, inner:]

    call = functools.partial(fused.silu_mul, gate_up)
    operation = Operation([call], 3 * m * inner * dtype.itemsize, 5 * m * inner, "float32", error)
    add_baseline(operation, place, "torch eager", lambda: [eager])
    return operation


def rope_and_cache_write(case: Case, place: Place) -> Operation:
    shape, m, dtype = case.shape, case.rows, getattr(torch, case.dtype)
    heads, kv_heads, d = shape.heads, shape.kv_heads, shape.head_dim
    qkv = place.normal(m, (heads + 2 * kv_heads) * d, dtype=dtype)
    angle = torch.arange(m)[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
    cos_sin = torch.stack([angle.cos(), angle.sin()], -1).float()
    rotations = torch.view_as_complex(cos_sin)[:, None]
    cache, slots = torch.zeros(2, m, kv_heads, d, dtype=dtype), torch.arange(m)
    call = functools.partial(fused.rope_and_cache_write, qkv, rotations, heads, kv_heads, cache, slots, dtype)

    def error() -> tuple[float, float]:
        q, k, v = (t.unflatten(1, (-1, d)) for t in qkv.split([heads * d, kv_heads * d, kv_heads * d], 1))
        want_q, want_k = (fused_oracle.rope(t, slots, cos_sin, None, 0.0) for t in (q, k))
        got = call()
        found = largest(relative(got, want_q), relative(cache[0], want_k))
        return (found if torch.equal(cache[1], v) else math.nan), Rounding[dtype]

    def eager() -> None:
        x = qkv.view(m, -1, d)
        cos, sin = cos_sin.to(dtype)[:, None].unbind(-1)
        a, b = x[:, : heads + kv_heads, 0::2], x[:, : heads + kv_heads, 1::2]
        both = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        cache[0, slots], cache[1, slots] = both[:, heads:], x[:, heads + kv_heads :]

    per_token = (2 * heads + 4 * kv_heads) * d * dtype.itemsize + 4 * d + 8
    operation = Operation([call], m * per_token, 3 * m * (heads + kv_heads) * d, "float32", error)
    add_baseline(operation, place, "torch eager", lambda: [eager])
    return operation


def sample(case: Case, place: Place) -> Operation:
    """The draw itself, over the whole vocabulary: noise by name (philox) and an argmax."""
    rows, vocab, temperature = case.rows, case.shape.vocab, dict(case.options)["temperature"]
    logits = place.normal(rows, vocab) * 3

    def call() -> list[int]:
        return [int((logits[i] / temperature + gumbel(vocab, i, 0, 100)).argmax()) for i in range(rows)]

    def error() -> tuple[float, float]:
        """Against the same draw in float64, as a share of the rows."""
        exact = [
            int((logits[i].double() / temperature + gumbel(vocab, i, 0, 100).double()).argmax()) for i in range(rows)
        ]
        return sum(a != b for a, b in zip(call(), exact, strict=True)) / rows, 0.0

    operation = Operation([call], logits.nbytes, 60 * rows * vocab, "float32", error)
    plain = [lambda: torch.multinomial((logits / temperature).softmax(-1), 1)]
    add_baseline(operation, place, "torch.multinomial", lambda: plain)
    return operation


OPERATIONS: dict[str, Prepare] = {
    "linear": linear,
    "decode": attention,
    "prefill": attention,
    "add_rmsnorm": add_rmsnorm,
    "silu_mul": silu_mul,
    "rope_and_cache_write": rope_and_cache_write,
    "sample": sample,
}
