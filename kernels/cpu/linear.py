"""y = x W^T + b on a CPU, by the fastest op that torch ships for the number of rows.

A weight is kept in up to two forms, both made once at load:

    few rows    4-bit groups of 32 and more: torch's int4 op; int8 with a scale for each row: its int8 op (AVX-512/AVX2,
                bf16 activations and scales, fp32 sums). A decode step reads the weights once for a handful of rows,
                so bytes are what counts: 0.5 to 0.625, or 1, a weight against 2. Torch has no faster op than the dense
                one for fp8, for 5 and 6 bits and for groups of 8-bit weights (Q8_0): packed bf16.
    many rows   a dense copy in oneDNN's blocked layout, in the dtype that this CPU multiplies fastest: bf16 with AMX,
                else fp16 where it is native (AVX512-FP16: twice the rate of bf16 there), else float32.

W8A8 weights have one form for all: int8 x int8, 5 times the rate of fp16 with AVX512-VNNI. Between such products the
activations stay float32: what a conversion costs, and the rounding before each product, is not far from the product.
`Plan` says which; float32 keeps a single packed float32 form: the exact path. With `batch_invariant` there is one form
for any number of rows, whose sums do not depend on how many rows there are: oneDNN's packed matmul has that property
from two rows up (one row takes another kernel, so it is padded to two); tests/kernels/cpu checks it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels.cpu import rows
from kernels.formats import Weight, dequantize

Multiply = Callable[[torch.Tensor], torch.Tensor]

_TINY = torch.tensor(1e-30)  # the least step: a row of zeros is divided by it
SLAB = 8192  # rows of a weight that are dequantised at a time: bounds the float32 scratch


@functools.cache
def cpu_features() -> frozenset[str]:
    """What decides between the ops: "amx" (bf16 tiles); "bf16", "fp16", "vnni" (native arithmetic); "onednn"."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    found = {"onednn"}
    if has.get("amx_bf16", has.get("amx_tile", False)) or torch.cpu._is_amx_tile_supported():
        found.add("amx")
    if has.get("avx512_bf16", False) or torch.cpu._is_avx512_bf16_supported():
        found.add("bf16")
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        found.add("fp16")
    if has.get("avx512_vnni", False) or torch.cpu._is_vnni_supported():
        found.add("vnni")
    return frozenset(found)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which form serves which number of rows.

    few, many: dtypes of the activations in the two forms. few_rows: up to how many rows the first one serves.
    quantized: quantised weights run as they are in the first form, where torch has an op for them.
    """

    few: torch.dtype
    many: torch.dtype
    few_rows: int
    quantized: bool
    batch_invariant: bool
    eight_bit_input: bool = False  # most weights are W8A8

    def dtype(self, rows: int) -> torch.dtype:
        """What a linear wants its input in; it takes any float dtype, this one without a conversion."""
        if self.eight_bit_input:
            return torch.float32
        return self.few if rows <= self.few_rows else self.many


def plan(dtype: torch.dtype, batch_invariant: bool, spare_bytes: int, dense_bytes: int) -> Plan:
    """The forms for a model that computes in `dtype`.

    dense_bytes: what a second, 2-byte copy of the weights would take; without room for it in `spare_bytes`, 4-bit
    blocks serve many rows too.
    """
    if dtype == torch.float32:
        return Plan(torch.float32, torch.float32, 0, False, batch_invariant)
    features = cpu_features()
    many = torch.bfloat16 if "amx" in features else torch.float16 if "fp16" in features else torch.float32
    room = dense_bytes * many.itemsize // 2 <= spare_bytes
    if batch_invariant:
        return Plan(many, many, 0, False, True) if room else Plan(torch.bfloat16, torch.bfloat16, 1 << 30, True, True)
    return Plan(torch.bfloat16, many, 6 if room else 1 << 30, True, False)


def head_plan(body: Plan) -> Plan:
    """The form of the matmul that makes the logits: never bf16, whose 8 bits round logits of 20 to steps of 1/8,
    so that close ones tie and greedy tokens change."""
    dtype = torch.float16 if body.few != torch.float32 and "fp16" in cpu_features() else torch.float32
    return Plan(dtype, dtype, 0, False, body.batch_invariant)


class Linear:
    """One weight [n, k] in the forms of `plan`, and its bias [n]."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None, plan: Plan):
        self.n = weight.q.shape[0]
        self.plan = plan
        self.bytes = weight.bytes  # that a decode step has to read, in the checkpoint's own format
        self._int8 = weight.eight_bit_input and weight.q.dtype == torch.int8
        dtypes = {torch.float32} if self._int8 else {plan.few, plan.many}
        self._bias = {dtype: bias.to(dtype) for dtype in dtypes} if bias is not None else {}
        self._few = self._many = None
        if self._int8:
            self._few = self._many = _int8(weight)
            return
        if plan.few_rows > 0:
            as_stored = _as_stored(weight) if plan.quantized else None
            self._few = as_stored or _packed(weight, plan.few)
            if as_stored is None and plan.few == plan.many:
                self._many = self._few
        if self._many is None and plan.few_rows < 1 << 30:
            self._many = _packed(weight, plan.many)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] -> [M, N] in plan.dtype(M); under `eight_bit_input` those of other weights in the form's own."""
        count = x.shape[0]
        plan = self.plan
        few = count <= plan.few_rows
        dtype = torch.float32 if self._int8 else plan.few if few else plan.many
        if x.dtype != dtype:
            x = x.to(dtype)
        multiply = self._few if few else self._many
        assert multiply is not None
        if count == 1 and plan.batch_invariant:
            y = multiply(F.pad(x, (0, 0, 0, 1)))[:1]
        else:
            y = multiply(x)
        y = y.add_(self._bias[dtype]) if self._bias else y
        return y.to(plan.dtype(count)) if self._int8 else y


def _as_stored(weight: Weight) -> Multiply | None:
    """By one of torch's ops for quantised weights (bf16 activations, scales and minima); None where there is none."""
    q, d, n = weight.q, weight.d, weight.q.shape[0]
    if d is None or n % 16:
        return None
    if q.dtype == torch.int8 and weight.z is None and weight.m is None and d.shape[1] == 1:
        scale, q = d[:, 0].bfloat16(), q.contiguous()
        return _reordered(weight, lambda x: torch.ops.aten._weight_int8pack_mm(x, q, scale))
    group = next((g for g in (256, 128, 64, 32) if weight.group % g == 0 and q.shape[1] % g == 0), 0)
    if weight.bits != 4 or not group:
        return None
    # The op's weight is (q - 8) s + z, so s = d and z = m + 8 d.
    minimum = weight.minimum()
    assert minimum is not None
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
    scales = torch.stack([d.float(), minimum + 8 * d.float()], -1).repeat_interleave(weight.group // group, 1)
    scales = scales[:, : q.shape[1] // group].transpose(0, 1).bfloat16().contiguous()
    op = torch.ops.aten._weight_int4pack_mm_for_cpu
    return _reordered(weight, lambda x: op(x, packed, group, scales))


def _reordered(weight: Weight, multiply: Multiply) -> Multiply:
    order = weight.order
    return multiply if order is None else lambda x: multiply(x.index_select(1, order))


def _int8(weight: Weight) -> Multiply:
    """int8 x int8: each row of x, float32, is rounded to 127 steps on either side of 0. The sums are whole numbers,
    hence exact and the same in any batch. oneDNN multiplies unsigned activations and packed weights and scales the sums
    in one pass; without VNNI it would add pairs in 16 bits, which overflow, so `torch._int_mm` does it there."""
    assert weight.d is not None
    q, scale = weight.q.contiguous(), weight.d[:, 0].float().contiguous()
    if "vnni" in cpu_features():
        packed = torch.ops.onednn.qlinear_prepack(q, None)
        points, op = torch.zeros(len(scale), dtype=torch.int32), torch.ops.onednn.qlinear_pointwise

        def multiply(x: torch.Tensor) -> torch.Tensor:
            if rows.fits(x):
                rounded, step = rows.round_rows(x)
            else:
                step = _int8_step(x)
                rounded = (x / step).add_(rows.ROUND + rows.ZERO).view(torch.int32).to(torch.uint8)
            y = op(rounded, 1.0, rows.ZERO, packed, scale, points, None, 1.0, 0, torch.float32, "none", [], "")
            return y.mul_(step)  # type: ignore[no-any-return]

        return multiply
    q = q.t()
    return lambda x: torch._int_mm((x / (step := _int8_step(x))).round_().to(torch.int8), q).mul(scale).mul_(step)


def _int8_step(x: torch.Tensor) -> torch.Tensor:
    # Few rows cost calls; many, passes over them.
    most = x.abs().amax(-1, keepdim=True) if x.shape[0] <= 64 else torch.maximum(x.amax(-1, True), -x.amin(-1, True))
    return torch.add(_TINY, most, alpha=1 / 127)


def _packed(weight: Weight, dtype: torch.dtype) -> Multiply:
    n = weight.q.shape[0]
    slabs = [dequantize(weight[i : i + SLAB], dtype) for i in range(0, n, SLAB)]
    dense = torch.cat(slabs) if len(slabs) > 1 else slabs[0]
    if "onednn" not in cpu_features():
        return lambda x: F.linear(x, dense)
    packed = torch.ops.mkldnn._reorder_linear_weight(dense.contiguous(), 16)
    op = torch.ops.mkldnn._linear_pointwise
    return lambda x: op(x, packed, None, "none", [], "")
