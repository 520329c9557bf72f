"""What matmuls do behind their sums, in the interpreter, against plain float32."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.formats import Weight
from kernels.gpu import epilogue, fused, linear_w4, linear_w8, split_k, w4_layout
from kernels.gpu.epilogue import Epilogue, Norm
from kernels.gpu.split_k import Tile
from kernels.gpu.tiles import H100
from kernels.oracle import fused as oracle

EPS = 1e-5
NAN = float("nan")


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(kind: str, n: int, k: int, seed: int, turns: bool = False) -> tuple[Any, torch.Tensor]:
    """A packed weight, and its float32 values [n, k]; turns: rows of gate and up are packed in turns."""
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    d, order = torch.full((n, k // 32), 0.01), epilogue.in_turns if turns else (lambda x: x)
    dense = (q.float() - 7.5) * 0.01
    if kind == "w4":
        return w4_layout.pack(order(q), order(d), -7.5 * order(d), kw=2), dense
    stored = Weight((q - 8).view(torch.int8), d, d / 2, None, 32, 8).rows(order)
    return linear_w8.pack(stored, 90), dense


def multiply(kind: str, x: torch.Tensor, weight: Any, out: torch.Tensor, split: int, tail: Epilogue) -> None:
    """Twice would add twice: once, on a poisoned workspace whose counters must come back to zero."""
    workspace = split_k.Workspace(H100, "cpu")
    workspace.partials.fill_(NAN)
    tile = Tile(16, 64, 64, min(split, x.shape[1] // 64), 4, 3)
    run = linear_w4.w4a16 if kind == "w4" else linear_w8.w8a16
    run(x, weight, out, workspace, tile=tile, epilogue=tail)
    assert not workspace.counters.any()


def squared(residual: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(residual, (0, -residual.shape[1] % 64))
    return padded.square().unflatten(1, (-1, 64)).sum(-1)


def close(got: torch.Tensor, want: torch.Tensor, allowed: float) -> None:
    assert ((got.float() - want).norm() / want.norm()).item() < allowed and not got.isnan().any()


@pytest.mark.parametrize("kind", ("w4", "w8"))
@settings(max_examples=8)
@given(
    m=st.integers(1, 18), inner=st.sampled_from((16, 32, 200, 264)), split=st.integers(1, 3), out_exp=st.integers(0, 4)
)
def test_silu(kind: str, m: int, inner: int, split: int, out_exp: int) -> None:
    k = 192
    weight, dense = weight_of(kind, 2 * inner, k, 1, turns=True)
    x = normal(m, k, seed=m).half()
    out = torch.full((m + 1, inner), NAN, dtype=torch.float16)
    out[m] = 7
    multiply(kind, x, weight, out[:m], split, Epilogue(silu=True, out_exp=out_exp))
    close(out[:m] * 2.0**out_exp, oracle.silu_mul(x.float() @ dense.t()), 2e-3)
    assert (out[m] == 7).all()


@pytest.mark.parametrize("kind", ("w4", "w8"))
@settings(max_examples=10)
@given(
    m=st.integers(1, 18), h=st.sampled_from((64, 192, 576, 208)), split=st.integers(1, 3),
    factor=st.sampled_from((1.0, 0.22)), growth=st.sampled_from((1.0, 1e-2, 3e4)),
)  # fmt: skip
def test_a_norm_spread_over_two_matmuls(kind: str, m: int, h: int, split: int, factor: float, growth: float) -> None:
    """add in one, norm in the next: as the sum, its RMSNorm and the product, though the row grows or shrinks."""
    k, n = 128, 96
    first, dense = weight_of(kind, h, k, 1)
    residual, scale = normal(m + 1, h, seed=2) * 0.05 / growth, normal(h, seed=3).abs() + 0.1
    x = (normal(m, k, seed=4) * 0.05).half()
    want = residual[:m] + factor * (x.float() @ dense.t())
    now, before = squared(residual[:m]), torch.full((m, -(-h // 64)), NAN)
    norm = Norm(residual[:m], now, before, EPS)
    canary = residual[m].clone()
    handed_on = torch.full((m + 1, h), NAN, dtype=torch.float16)
    handed_on[m] = 7
    multiply(kind, x, first, handed_on[:m], split, Epilogue(norm, scale, factor=factor))
    close(residual[:m], want, 1e-3)
    assert torch.equal(residual[m], canary) and (handed_on[m] == 7).all()
    torch.testing.assert_close(before, squared(residual[:m]), rtol=1e-5, atol=0)
    if h % 64:
        return  # no matmul takes such an x
    second, dense = weight_of(kind, n, h, 5)
    out = torch.full((m, n), NAN, dtype=torch.float32)
    multiply(kind, handed_on[:m], second, out, split, Epilogue(norm.added()))
    close(out, oracle.add_rmsnorm(None, residual[:m], scale, EPS)[1] @ dense.t(), 2e-3)


def test_norm_and_silu_together() -> None:
    h, inner, m = 128, 64, 3
    weight, dense = weight_of("w4", 2 * inner, h, 1, turns=True)
    residual, scale = normal(m, h, seed=2), normal(h, seed=3)
    x = torch.empty(m, h).half()
    norm = fused.start_norm(residual, scale, x, EPS)
    out = torch.full((m, inner), NAN, dtype=torch.float16)
    multiply("w4", x, weight, out, 2, Epilogue(norm, silu=True, out_exp=4))
    normed = oracle.add_rmsnorm(None, residual, scale, EPS)[1]
    close(out * 16, oracle.silu_mul(normed @ dense.t()), 2e-3)


def test_a_row_that_is_not_finite_stays_so_alone() -> None:
    h, k = 64, 64
    weight, _ = weight_of("w4", h, k, 1)
    residual = normal(2, h, seed=2)
    residual[0, 5] = NAN
    norm = Norm(residual, squared(residual), torch.empty(2, 1), EPS)
    x = torch.empty(2, h).half()
    multiply("w4", normal(2, k, seed=3).half(), weight, x, 1, Epilogue(norm, torch.ones(h)))
    out = torch.empty(2, h)
    multiply("w4", x, weight, out, 1, Epilogue(norm.added()))
    assert out[0].isnan().all() and out[1].isfinite().all() and residual[0, 5].isnan()


def test_rows_in_turns() -> None:
    rows = torch.arange(32)
    assert epilogue.in_turns(rows).tolist() == [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]
    assert dataclasses.replace(epilogue.PLAIN, silu=True).out_shape(3, 64) == (3, 32)
