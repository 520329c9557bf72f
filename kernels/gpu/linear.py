"""A product with a quantised weight, whichever of the two layouts it has and however many rows there are."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.gpu import linear_w4, linear_w8
from kernels.gpu.epilogue import PLAIN, Epilogue
from kernels.gpu.fused import Rounded
from kernels.gpu.linear_w8 import W8
from kernels.gpu.split_k import Workspace
from kernels.gpu.tiles import current_gpu
from kernels.gpu.w4_layout import W4

MOST = min(linear_w4.CROSSOVER, linear_w8.CROSSOVER)  # rows that `multiply` takes without a scratch buffer


def multiply(
    x: torch.Tensor | Rounded, weight: W4 | W8, out: torch.Tensor, workspace: Workspace, scratch: torch.Tensor, *,
    x_exp: int = 0, epilogue: Epilogue = PLAIN,
) -> None:  # fmt: skip
    """out [M, N] = x [M, K] @ weight^T, x fp16 (the true x times 2^-x_exp) or bf16; w8a8 takes Rounded and float32 too.

    Above the cross-over the weight is dequantised into scratch (at least N * K elements of x's dtype) for torch.mm; out
    must have x's dtype then, and the epilogue be PLAIN.
    """
    if isinstance(weight, W8) and weight.eight_bit_input:
        linear_w8.w8a8(x, weight, out, workspace, x_exp=x_exp)
        return
    assert isinstance(x, torch.Tensor)
    w4 = isinstance(weight, W4)
    config = linear_w4.config if w4 else linear_w8.config
    if config(x.shape[0], weight.n, weight.k, weight.group, x.dtype, current_gpu()) is not None:
        product: Callable[..., None] = linear_w4.w4a16 if w4 else linear_w8.w8a16
        product(x, weight, out, workspace, x_exp=x_exp, epilogue=epilogue)
        return
    assert scratch.dtype == x.dtype == out.dtype and epilogue is PLAIN, (scratch.dtype, x.dtype, out.dtype)
    dense = scratch.view(-1)[: weight.n * weight.k].view(weight.n, weight.k)
    dequantise: Callable[..., None] = linear_w4.dequant_w4 if w4 else linear_w8.dequant_w8
    dequantise(weight, dense, x_exp=x_exp if x.dtype == torch.float16 else 0)
    torch.mm(x, dense.t(), out=out)
