"""The number formats that checkpoints store weights in -> `Weight`, the one form in which the engine meets them.

Every quantised format is w = q d + m or w = (q - z) d for the integers q of a matrix [N, K], with a scale d and a
minimum m or zero point z (or neither: w = q d) for each row and group of consecutive columns. Pure torch, any device.

    GGUF blocks, in each row one after another, fp16 d and m first:
    Q4_0  (q - 8) d     Q5_0  (q - 16) d    Q8_0  q d               32 columns
    Q4_1  q d + m       Q5_1  q d + m                               32
    Q4_K, Q5_K  q (d s) - d' m', with s and m' 6-bit integers       32, in blocks of 256 that share d and d'
    Q6_K  (q - 32) (d s), s an 8-bit integer                        16, likewise

    several tensors, see `engine.checkpoint.quantized` for their names and shapes:
    AWQ (4 bits), GPTQ and GPTQ_V2 (4 and 8), PACKED (compressed-tensors, 4 and 8)    (q - z) d
    INT8 (per row), FP8 (e4m3, per tensor, row or block of 128 x 128)   q d
    W8A8, FP8_A8: the same, made for activations in the weights' type
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED = DENSE | {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of an AWQ word is column AWQ_ORDER[i] of its eight
FP8_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Weight:
    """A matrix [N, K] as it was stored.

    q [N, K]: the weights themselves in a float dtype if d is None, else uint8, int8 or float8_e4m3fn.
    d, m, z [N, groups]: float scales; float minima; integer zero points. `group` columns share one (the last group may
        be shorter). bits: of a q in the file.
    order int64 [K]: q[:, i] is column order[i] of the matrix (GPTQ sorts columns by group); None: in order.
    eight_bit_input: made for activations that are rounded to q's type per row.
    """

    q: torch.Tensor
    d: torch.Tensor | None = None
    m: torch.Tensor | None = None
    z: torch.Tensor | None = None
    group: int = 0
    bits: int = 16
    order: torch.Tensor | None = None
    eight_bit_input: bool = False

    def __getitem__(self, rows: slice) -> Weight:
        return self.rows(lambda x: x[rows])

    @property
    def bytes(self) -> int:
        """That reading it takes: q at its bits, the rest as it lies here."""
        return self.q.numel() * self.bits // 8 + sum(x.nbytes for x in (self.d, self.m, self.z) if x is not None)

    def rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Weight:
        """`change` applied to everything that has a row for each row of the matrix."""
        d, m, z = (None if x is None else change(x) for x in (self.d, self.m, self.z))
        return dataclasses.replace(self, q=change(self.q), d=d, m=m, z=z)

    @property
    def layout(self) -> tuple[Any, ...]:
        """What weights of one matmul have in common."""
        dtypes = (None if x is None else x.dtype for x in (self.q, self.d, self.m, self.z, self.order))
        return self.group, self.bits, self.eight_bit_input, *dtypes

    def minimum(self) -> torch.Tensor | None:
        """m, or what z makes of it, float32 [N, groups]."""
        if self.z is not None:
            assert self.d is not None
            return -self.z.float() * self.d.float()
        return None if self.m is None else self.m.float()


def joined(weights: list[Weight]) -> Weight | None:
    """One weight of all their rows; None if they differ in more than those."""
    first = weights[0]
    if len({w.layout for w in weights}) > 1:
        return None
    if any(first.order is not None and not torch.equal(first.order, w.order) for w in weights if w.order is not None):
        return None

    def cat(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
        there = [x for x in parts if x is not None]
        return torch.cat(there) if there else None

    d, m, z = (cat([getattr(w, x) for w in weights]) for x in ("d", "m", "z"))
    return dataclasses.replace(first, q=torch.cat([w.q for w in weights]), d=d, m=m, z=z)


def dequantize(weight: Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[N, K], columns in order. Computed in float32, then rounded to `dtype` once."""
    if weight.d is None:
        return weight.q.to(dtype)
    w = weight.q.float()

    def spread(x: torch.Tensor) -> torch.Tensor:
        return x.float().repeat_interleave(weight.group, 1)[:, : w.shape[1]]

    if weight.z is not None:
        w = w - spread(weight.z)
    w = w * spread(weight.d)
    if weight.m is not None:
        w += spread(weight.m)
    return (w if weight.order is None else w[:, weight.order.argsort()]).to(dtype)


def decode(kind: str, parts: Mapping[str, torch.Tensor]) -> Weight:
    """kind: a GGUF or dense type, parts {"": uint8 [N, bytes of a row]}; or one of several tensors, by their names.

    ValueError for GPTQ groups of different sizes.
    """
    if kind in DENSE:
        q = parts[""].view(DENSE[kind])
        return Weight(q, bits=8 * q.itemsize)
    if "" in parts:
        return _BLOCKS[kind](parts[""])
    return _SEVERAL[kind](kind, parts)


# GGUF. Blocks are [N, blocks of a row, bytes].


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    return blocks[..., at : at + 2].contiguous().view(torch.float16)[..., 0]


def _bits(values: torch.Tensor, width: int) -> torch.Tensor:
    """[..., X] of uint8 -> [..., 8 / width, X]: the lowest `width` bits first."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=values.device)
    return (values.unsqueeze(-2) >> shifts[:, None]) & ((1 << width) - 1)


def _quarters(raw: torch.Tensor, bits: int, minimum: bool) -> Weight:
    """Q4_0, Q4_1, Q5_0, Q5_1: d, m if there is one, the fifth bits as 4 bytes, 16 bytes of two nibbles each."""
    head = 4 if minimum else 2
    blocks = raw.view(raw.shape[0], -1, head + 16 + (4 if bits == 5 else 0))
    q = _bits(blocks[..., -16:], 4).flatten(-2)
    if bits == 5:
        q |= _bits(blocks[..., head : head + 4], 1).transpose(-1, -2).flatten(-2) << 4
    d = _half(blocks, 0)
    q = q.flatten(1)
    if minimum:
        return Weight(q, d, _half(blocks, 2), group=32, bits=bits)
    if bits == 4:
        return Weight(q, d, d * -8, group=32, bits=4)
    return Weight(q.view(torch.int8) - 16, d, group=32, bits=5)


def _q8_0(raw: torch.Tensor) -> Weight:
    blocks = raw.view(raw.shape[0], -1, 34)
    return Weight(blocks[..., 2:].view(torch.int8).flatten(1), _half(blocks, 0), group=32, bits=8)


def _k45(raw: torch.Tensor, bits: int) -> Weight:
    """Q4_K, Q5_K: d, d', 12 bytes of scales and minima, the fifth bits as 32 bytes, 128 bytes of two nibbles each."""
    blocks = raw.view(raw.shape[0], -1, 144 if bits == 4 else 176)
    low, middle, high = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    s = torch.cat([low & 63, (high & 15) | (low >> 2 & 48)], -1)
    m = torch.cat([middle & 63, (high >> 4) | (middle >> 2 & 48)], -1)
    q = _bits(blocks[..., -128:].unflatten(-1, (4, 32)), 4).flatten(-3)
    if bits == 5:
        q |= _bits(blocks[..., 16:48], 1).flatten(-2) << 4
    d, minimum = (_half(blocks, 2 * i).float()[..., None] * x.float() for i, x in enumerate((s, m)))
    return Weight(q.flatten(1), d.flatten(1), -minimum.flatten(1), group=32, bits=bits)


def _q6_k(raw: torch.Tensor) -> Weight:
    """128 bytes of low nibbles, 64 bytes of four upper pairs of bits, 16 int8 scales, d."""
    blocks = raw.view(raw.shape[0], -1, 210)
    low = _bits(blocks[..., :128].unflatten(-1, (2, 64)), 4).flatten(-3)
    high = _bits(blocks[..., 128:192].unflatten(-1, (2, 32)), 2).flatten(-3)
    d = _half(blocks, 208).float()[..., None] * blocks[..., 192:208].view(torch.int8).float()
    return Weight(((low | high << 4).view(torch.int8) - 32).flatten(1), d.flatten(1), group=16, bits=6)


_BLOCKS: dict[str, Callable[[torch.Tensor], Weight]] = {
    **{f"Q{bits}_{m}": functools.partial(_quarters, bits=bits, minimum=m == 1) for bits in (4, 5) for m in (0, 1)},
    **{f"Q{bits}_K": functools.partial(_k45, bits=bits) for bits in (4, 5)},
    "Q8_0": _q8_0,
    "Q6_K": _q6_k,
}


# Several tensors.


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [..., W] -> int16 [..., W * 32 / bits]: the lowest bits first."""
    shifts = torch.arange(0, 32, bits, device=words.device)
    return (words.unsqueeze(-1) >> shifts & ((1 << bits) - 1)).to(torch.int16).flatten(-2)


def _zero_points(
    q: torch.Tensor, d: torch.Tensor, z: torch.Tensor, bits: int, g_idx: torch.Tensor | None = None
) -> Weight:
    """8-bit q become int8, and a zero point in the middle disappears. g_idx [K]: the group of each column."""
    order = None
    group = -(-q.shape[1] // d.shape[1])
    if g_idx is not None:
        even = torch.arange(len(g_idx), device=g_idx.device) // group
        if not torch.equal(g_idx.long(), even):
            order = g_idx.argsort(stable=True)
            if not torch.equal(g_idx[order].long(), even):
                raise ValueError("g_idx has groups of different sizes; all must have group_size columns")
            q = q[:, order]
    if bits == 4:
        return Weight(q.to(torch.uint8), d, z=z.contiguous(), group=group, bits=4, order=order)
    z = z - 128
    zero = z if z.any() else None
    return Weight((q - 128).to(torch.int8), d, z=zero, group=group, bits=8, order=order)


def _awq(kind: str, parts: Mapping[str, torch.Tensor]) -> Weight:
    """AutoAWQ's GEMM layout: words along N, and their nibbles interleaved."""
    order = torch.tensor(AWQ_ORDER, device=parts["qweight"].device).argsort()
    q, z = (unpack(parts[x], 4).unflatten(-1, (-1, 8))[..., order].flatten(-2).t() for x in ("qweight", "qzeros"))
    return _zero_points(q, parts["scales"].t().contiguous(), z, 4)


def _gptq(kind: str, parts: Mapping[str, torch.Tensor]) -> Weight:
    """Words along K; zero points less one, except in version 2."""
    words, scales = parts["qweight"], parts["scales"]
    bits = 32 * parts["qzeros"].shape[1] // scales.shape[1]
    z = unpack(parts["qzeros"], bits).t() + (0 if kind == "GPTQ_V2" else 1)
    return _zero_points(unpack(words.t(), bits), scales.t().contiguous(), z, bits, parts.get("g_idx"))


def _packed(kind: str, parts: Mapping[str, torch.Tensor]) -> Weight:
    """compressed-tensors' pack-quantized: words along K, zero points packed along N; none: the middle."""
    d, k = parts["weight_scale"], int(parts["weight_shape"][1])
    n, bits = len(d), 32 * parts["weight_packed"].shape[1] // k
    z = torch.full(d.shape, 1 << (bits - 1), dtype=torch.int16, device=d.device)
    if "weight_zero_point" in parts:
        z = unpack(parts["weight_zero_point"].t(), bits).t()[:n]
    return _zero_points(unpack(parts["weight_packed"], bits)[:, :k], d, z, bits, parts.get("weight_g_idx"))


def _eight(kind: str, parts: Mapping[str, torch.Tensor]) -> Weight:
    """int8 or fp8 as they are, and a scale for all, for each row, or for each block of 128 x 128."""
    q = parts["weight"]
    n, k = q.shape
    d = parts["weight_scale"]
    if d.numel() == 1 or d.shape[0] == n:
        d, group = d.reshape(-1, 1).expand(n, 1), k
    else:
        d, group = d.repeat_interleave(FP8_BLOCK, 0)[:n], FP8_BLOCK
    return Weight(q, d.contiguous(), group=group, bits=8, eight_bit_input=kind in ("W8A8", "FP8_A8"))


_SEVERAL: dict[str, Callable[[str, Mapping[str, torch.Tensor]], Weight]] = {
    **{"AWQ": _awq, "GPTQ": _gptq, "GPTQ_V2": _gptq, "PACKED": _packed},
    **dict.fromkeys(("INT8", "W8A8", "FP8", "FP8_A8"), _eight),
}
