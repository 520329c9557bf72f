"""Random 4-bit weights for the measurements, packed as a GPU has them."""

from __future__ import annotations

import dataclasses

import torch

from bench.kernel_cases import FORMATS, Case
from bench.operations import Place
from kernels.gpu import w4_layout
from kernels.gpu.tiles import current_gpu

FP16_ARITHMETIC = 6e-4  # twice the error of weights rounded to fp16 once


def packed_weight(case: Case, place: Place) -> tuple[w4_layout.W4, w4_layout.Parts]:
    """Random 4-bit weights [N, K] of the case's layer and format."""
    n, k = case.shape.linears[case.layer]
    group, zero_point = FORMATS[case.dtype]
    rng = place.generator(1)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=place.device, generator=rng)
    d = (0.005 + 0.01 * torch.rand(n, k // group, device=place.device, generator=rng)).half()
    if zero_point:
        m = torch.randint(0, 17, d.shape, device=place.device, generator=rng).half()
    else:
        m = (-7.5 * d.float() + 0.01 * torch.randn(d.shape, device=place.device, generator=rng)).half()
    weight = w4_layout.pack(q, d, m, kw=w4_layout.lane_order(current_gpu().capability), zero_point=zero_point)
    return weight, (q, d, m, zero_point)


def copy_of(weight: w4_layout.W4) -> w4_layout.W4:
    words, pairs = (t.view(torch.int32).clone().view(torch.uint32) for t in (weight.words, weight.pairs))
    return dataclasses.replace(weight, words=words, pairs=pairs)
