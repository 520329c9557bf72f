"""The 8-bit matmuls, each beside what PyTorch has for the same work, and the float32 oracle."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from bench.kernel_cases import EIGHT_BITS, Case
from bench.operations import Operation, Place, Rounding, add_baseline, elementwise, relative
from bench.timing import Call, copies
from kernels.formats import Weight, dequantize
from kernels.gpu import linear, linear_w8
from kernels.gpu.fused import quantise_rows
from kernels.gpu.split_k import Workspace
from kernels.gpu.tiles import current_gpu
from kernels.oracle import linear_w8 as oracle

SMALL_M = 64  # rows up to which torch's weight-only op is worth its time
GROUPS = 4e-4  # twice the error of weights rounded to fp16 once
NAN = float("nan")


def random_weight(case: Case, place: Place) -> Weight:
    """Random 8-bit weights [N, K] of the case's layer and format."""
    n, k = case.shape.linears[case.layer]
    kind, group, minimum = EIGHT_BITS[case.dtype]
    rng = place.generator(1)
    if kind == "int8":
        q = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=place.device, generator=rng)
    else:
        q = place.normal(n, k, seed=1).mul_(64).to(torch.float8_e4m3fn)
    d = (0.5 + torch.rand(n, k // (group or k), device=place.device, generator=rng)) * 1e-3
    m = torch.randn(d.shape, device=place.device, generator=rng) * 1e-2 if minimum else None
    return Weight(q, d, m, group=group or k, bits=8, eight_bit_input=case.kernel == "w8a8")


def prepare(case: Case, place: Place) -> Operation:
    """The product as the engine calls it; w8a8 with the rounding of its activations."""
    weight = random_weight(case, place)
    packed = linear_w8.pack(weight, current_gpu().capability)
    m, n, k = case.rows, packed.n, packed.k
    eight = case.kernel == "w8a8"
    if eight and not packed.eight_bit_input:
        raise ValueError(f"{current_gpu().name} has no float8 products")
    x = place.normal(m, k, dtype=torch.bfloat16 if packed.q.dtype == linear_w8.FP8 and eight else torch.float16)
    weights = [packed] + [_copy(packed) for _ in range(copies(packed.bytes, place.cache_bytes) - 1)]
    out = torch.empty(m, n, dtype=x.dtype, device=place.device)
    workspace = Workspace(current_gpu(), place.device)
    large = not eight and linear_w8.config(m, n, k, packed.group, x.dtype, current_gpu()) is None
    scratch = torch.empty(n * k if large else 0, dtype=x.dtype, device=place.device)

    def multiply(w: linear_w8.W8) -> None:
        if place.tile is not None:
            (linear_w8.w8a8 if eight else linear_w8.w8a16)(x, w, out, workspace, tile=place.tile)
        else:
            linear.multiply(x, w, out, workspace, scratch)

    def error() -> tuple[float, float]:
        out.fill_(NAN)
        workspace.partials.fill_(NAN)
        multiply(packed)
        exact = oracle.linear(x, dequantize(weight), packed.q.dtype if eight else None)
        # A last bit of a rounded activation may differ: the oracle divides as well, but not on the same device.
        return relative(out, exact), Rounding[x.dtype] + (1e-3 if eight else GROUPS)

    rate = ("int8" if packed.q.dtype == torch.int8 else "float8_e4m3fn") if eight else "float16"
    cost = linear_w8.bytes_and_flops(m, packed)
    operation = Operation([functools.partial(multiply, w) for w in weights], *cost, rate, error)
    add_baseline(operation, place, "torch.mm bf16", lambda: _mm(x, n, k, place))
    if eight and packed.q.dtype == torch.int8:
        add_baseline(operation, place, "torch._int_mm", lambda: _int_mm(m, weights, place))
    elif eight:
        add_baseline(operation, place, "torch._scaled_mm", lambda: _scaled_mm(m, weights, place))
    elif m <= SMALL_M and packed.per_row and packed.q.dtype == torch.int8 and place.device.type == "cuda":
        add_baseline(operation, place, "torch int8", lambda: _int8pack_mm(x, weights))
    return operation


def dequant_w8(case: Case, place: Place) -> Operation:
    """What w8a16 does first at many rows."""
    weight = random_weight(case, place)
    packed = linear_w8.pack(weight, current_gpu().capability)
    weights = [packed] + [_copy(packed) for _ in range(copies(packed.bytes, place.cache_bytes) - 1)]
    out = torch.empty(packed.n, packed.k, dtype=torch.float16, device=place.device)

    def error() -> tuple[float, float]:
        out.fill_(NAN)
        linear_w8.dequant_w8(packed, out)
        return elementwise(out, dequantize(weight))

    calls: list[Call] = [functools.partial(linear_w8.dequant_w8, w, out) for w in weights]
    operation = Operation(calls, packed.bytes + out.nbytes, 2 * out.numel(), "float32", error)
    add_baseline(operation, place, "torch eager", lambda: [functools.partial(_dequantised, w) for w in weights])
    return operation


def _dequantised(weight: linear_w8.W8) -> torch.Tensor:
    """Right for bytes that are numbers, which float8 on GPUs without it is not: that takes as long."""
    groups = weight.q.unflatten(1, (-1, weight.group)).float() * weight.d[..., None]
    return (groups if weight.m is None else groups + weight.m[..., None]).flatten(1).half()


def rows_in_eight_bits(case: Case, place: Place) -> Operation:
    """What w8a8 does first."""
    m, k, dtype = case.rows, case.shape.hidden, getattr(torch, case.dtype)
    cost = m * k * 3 + 4 * m, 4 * m * k
    x = place.normal(copies(cost[0], place.cache_bytes, 64), m, k, dtype=torch.float16)
    out = torch.empty(m, k, dtype=dtype, device=place.device)
    scales = torch.empty(m, 1, dtype=torch.float32, device=place.device)

    def error() -> tuple[float, float]:
        scales.fill_(NAN)
        quantise_rows(x[0], out, scales)
        q, d = oracle.quantise_rows(x[0], dtype)
        return relative(out.float() * scales, q.float() * d), 1e-3  # a tie may fall to either side

    calls: list[Call] = [functools.partial(quantise_rows, one, out, scales) for one in x]
    operation = Operation(calls, *cost, "float32", error)
    eager = functools.partial(oracle.quantise_rows, dtype=dtype)
    add_baseline(operation, place, "torch eager", lambda: [functools.partial(eager, one) for one in x])
    return operation


def _copy(weight: linear_w8.W8) -> linear_w8.W8:
    return dataclasses.replace(weight, q=weight.q.clone(), d=weight.d.clone())


def _mm(x: torch.Tensor, n: int, k: int, place: Place) -> list[Call]:
    sets = range(copies(2 * n * k, place.cache_bytes, 64))
    dense = [place.normal(n, k, dtype=torch.bfloat16, seed=i) for i in sets]
    y = torch.empty(x.shape[0], n, dtype=torch.bfloat16, device=place.device)
    x = x.bfloat16()
    return [functools.partial(torch.mm, x, w.t(), out=y) for w in dense]


def _int_mm(m: int, weights: list[linear_w8.W8], place: Place) -> list[Call]:
    """The product alone, without rounding x and without scales. torch wants more than 16 rows."""
    x = torch.ones(max(m, 17), weights[0].k, dtype=torch.int8, device=place.device)
    product: Callable[..., object] = torch._int_mm
    return [functools.partial(product, x, w.q.t()) for w in weights]


def _scaled_mm(m: int, weights: list[linear_w8.W8], place: Place) -> list[Call]:
    """The product with scales by row, without rounding x."""
    x = torch.ones(m, weights[0].k, device=place.device).to(torch.float8_e4m3fn)
    scales = torch.ones(m, 1, device=place.device)
    product = functools.partial(torch._scaled_mm, out_dtype=torch.bfloat16)
    return [functools.partial(product, x, w.q.t(), scale_a=scales, scale_b=w.d.t().contiguous()) for w in weights]


def _int8pack_mm(x: torch.Tensor, weights: list[linear_w8.W8]) -> list[Call]:
    op, x = torch.ops.aten._weight_int8pack_mm, x.bfloat16()
    return [functools.partial(op, x, w.q, w.d[:, 0].bfloat16()) for w in weights]
