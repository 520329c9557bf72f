"""4-bit weights as they lie in GPU memory, and what makes them from the files' formats. Pure torch, on any device, once
at load.

Every format is W[n, k] = q * d + m with q in 0..15 and d, m per row and group of 32, 64, 128 or all of K (per channel):
GGUF Q4_0 has m = -8d, Q4_1 has its own m, AWQ and GPTQ have m = -z * d. z * d needs 15 bits of mantissa where fp16 has
11, so an odd zero point is kept as such: W = (q - z) * d (`zero_point`), one instruction more in the kernel and exact.

words uint32 [N/16, 2K], 8 weights each, in the order of the tensor core's left operand: a thread's 128-bit load is what
it multiplies. A row holds 16 rows of W; the index in it is (k / 64, n % 8, lane, k / 16 % 4). A word holds rows
a = n % 8 and b = n % 8 + 8 times the four k that a lane owns of 16: with kw = 2 (wgmma) 2 lane + {0, 1} and
8 + 2 lane + {0, 1}, with kw = 4 (mma.sync) 4 lane + {0, 1} and 4 lane + {2, 3}: pairs 0 and 1.

    bits  31-30 | 29-26 | 25-22 | 21-18 | 17-14 | 13-10 |  9-6  |  5-2  |  1-0        a0 = row a, first k of the four;
           a3   |  b3   |  a1   |  b1   |  a2   |  b2   |  a0   |  b0   |  a3         a3 is cut: its low half is on top

pairs uint32 [N/16, K/G * 16], index (k / max(64, G), n % 8, group in 64, n / 8 % 2):
fp16 scale | fp16 minimum (or minus the zero point) << 16.

The kernel masks a pair out of a word and reads it as two fp16 numbers: with q at bits 6-9 that is the subnormal q *
2^-18, at bits 2-5 it is q * 2^-22. So no magic number is subtracted, and one fma makes two weights. The powers of two
hide in the scale: row a's scale is stored as d * 2^(18 - e), row b's as d * 2^(22 - e), minima as m * 2^-e, with e such
that the tensor's largest scale stays under 65504; the output takes 2^e.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from kernels.formats import Weight

FP16_MAX = 65504.0
SHIFTS = {(0, 0): 6, (0, 1): 22, (1, 0): 2, (1, 1): 18}  # (n / 8 % 2, k % 2) -> bit, in pair 0


@dataclasses.dataclass(frozen=True)
class W4:
    """A packed weight [n, k]. bytes: words and pairs as they lie on the device; alpha = 2^e; kw: which lane order (see
    above); order: of the columns, which whoever multiplies brings x into."""

    words: torch.Tensor
    pairs: torch.Tensor
    alpha: float
    n: int
    k: int
    group: int
    zero_point: bool
    kw: int
    order: torch.Tensor | None = None

    @property
    def name(self) -> str:
        return f"w4 g{self.group}{' zero' if self.zero_point else ''}"

    @property
    def bytes(self) -> int:
        return self.words.numel() * 4 + self.pairs.numel() * 4


def lane_order(capability: int) -> int:
    """kw for a compute capability (90 for sm_90): wgmma exists on Hopper alone."""
    return 2 if capability // 10 == 9 else 4


def _fragments(q: torch.Tensor, kw: int) -> torch.Tensor:
    """[N, K] -> [N/16, K/64, n%8, lane, k/16%4, k pair, n/8%2, k%2], a view."""
    n, k = q.shape
    if kw == 2:
        return q.view(n // 16, 2, 8, k // 64, 4, 2, 4, 2).permute(0, 3, 2, 6, 4, 5, 1, 7)
    return q.view(n // 16, 2, 8, k // 64, 4, 4, 2, 2).permute(0, 3, 2, 5, 4, 6, 1, 7)


def pack(q: torch.Tensor, d: torch.Tensor, m: torch.Tensor, *, kw: int, zero_point: bool = False) -> W4:
    """q uint8 [N, K] in 0..15; d [N, K/G]; m [N, K/G]: the minimum, or the zero point (0..16) if `zero_point`. N % 16
    == 0, K % 64 == 0."""
    n, k = q.shape
    group = k // d.shape[1]
    assert n % 16 == 0 and k % 64 == 0 and d.shape == m.shape == (n, k // group), (q.shape, d.shape, m.shape)
    assert group in (32, 64, 128) or group == k, f"group of {group}"
    top = d.abs().max().item()
    e = math.ceil(math.log2(top * 2**22 / FP16_MAX)) if top else 0
    parts = _fragments(q, kw)
    words = torch.zeros(parts.shape[:5], dtype=torch.int32, device=q.device)
    for pair in range(2):
        for (row, odd), shift in SHIFTS.items():
            part, bit = parts[..., pair, row, odd].int(), shift + 8 * pair
            words |= part << bit
            if bit > 28:  # rotated past the top
                words |= part >> (32 - bit)
    powers = torch.tensor([2.0**18, 2.0**22], device=q.device).view(2, 1, 1)  # rows a and b
    scale = d.float().view(n // 16, 2, 8, -1) * (powers * 2.0**-e)
    m = m.float().view(n // 16, 2, 8, -1)
    second = -m / powers if zero_point else m * 2.0**-e
    wide = max(64, group)
    pairs = torch.stack([scale, second], -1).view(n // 16, 2, 8, k // wide, wide // group, 2).permute(0, 3, 2, 4, 1, 5)
    pairs = pairs.half().contiguous().view(torch.uint32).view(n // 16, k // group * 16)
    return W4(words.view(torch.uint32).view(n // 16, 2 * k), pairs, 2.0**e, n, k, group, zero_point, kw)


def unpack(w: W4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """pack's inverse: q uint8 [N, K], d float32 [N, K/G], minimum or zero point float32 [N, K/G]."""
    words = w.words.view(torch.int32).view(w.n // 16, w.k // 64, 8, 4, 4).long() & 0xFFFFFFFF
    q = torch.empty(w.n, w.k, dtype=torch.uint8, device=words.device)
    parts = _fragments(q, w.kw)
    for pair in range(2):
        for (row, odd), shift in SHIFTS.items():
            bit = shift + 8 * pair
            parts[..., pair, row, odd] = (words >> bit | words << (32 - bit)) & 15
    wide = max(64, w.group)
    pairs = w.pairs.view(torch.float16).view(w.n // 16, w.k // wide, 8, wide // w.group, 2, 2).float()
    pairs = pairs.permute(5, 0, 4, 2, 1, 3).reshape(2, w.n // 16, 2, 8, w.k // w.group)
    powers = torch.tensor([2.0**18, 2.0**22], device=words.device).view(2, 1, 1)
    d = pairs[0] / powers * w.alpha
    m = -pairs[1] * powers if w.zero_point else pairs[1] * w.alpha
    return q, d.reshape(w.n, -1), m.reshape(w.n, -1)


# (q, d, m, zero_point), the arguments of pack().
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]


def parts(weight: Weight) -> Parts:
    """Of a 4-bit weight. Minima where fp16 holds all of them exactly (symmetric GPTQ: z = 8), zero points otherwise."""
    q, d, m, z = weight.q, weight.d, weight.m, weight.z
    assert d is not None and weight.bits == 4
    if z is not None:
        m = -z.double() * d.double()
        if not torch.equal(m.half().double(), m):
            return q, d, z.half(), True
    assert m is not None
    return q, d, m, False
