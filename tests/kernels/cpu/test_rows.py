"""The CPU's kernels of single rows against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu import rows, vector
from kernels.cpu.vector import WIDTH, at, load, store

SHAPES = {"count": st.integers(1, 70), "size": st.sampled_from([16, 64, 576, 1536]), "seed": st.integers(0, 1000)}


@settings(max_examples=30, deadline=None)
@given(**SHAPES, add=st.booleans(), eps=st.sampled_from([1e-5, 1e-6]))
def test_add_rmsnorm(count: int, size: int, seed: int, add: bool, eps: float) -> None:
    torch.manual_seed(seed)
    residual, weight = torch.randn(count, size) * 3, torch.randn(size)
    delta = torch.randn(count, size) if add else None
    x = (residual if delta is None else residual + delta).double()
    out = rows.add_rmsnorm(residual, delta, weight * math.sqrt(size), eps)
    assert torch.equal(residual.double(), x.float().double())
    wanted = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(**SHAPES, scale=st.sampled_from([0.1, 3.0, 60.0]))
def test_silu_mul(count: int, size: int, seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    gate_up = torch.randn(count, 2 * size) * scale
    gate, up = gate_up.double().chunk(2, -1)
    torch.testing.assert_close(
        rows.silu_mul(gate_up).double(), torch.nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-30
    )


def test_silu_mul_keeps_nan_and_what_is_large() -> None:
    gate = torch.tensor([torch.nan, 1e30, -1e30, 200.0, -200.0, 0.0, 1.0, -0.0]).repeat(2)
    out = rows.silu_mul(torch.cat([gate, torch.ones(16)])[None])[0, :8]
    assert out[0].isnan() and out[1] == gate[1] and out[3] == 200
    assert out[[2, 4]].abs().max() < 1e-7 and out[5] == 0


@settings(max_examples=30, deadline=None)
@given(**SHAPES, scale=st.sampled_from([1e-20, 1.0, 1e6]))
def test_round_rows(count: int, size: int, seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    x = torch.randn(count, size) * scale
    x[count // 2] = 0
    rounded, step = rows.round_rows(x)
    torch.testing.assert_close(step, x.abs().amax(-1, keepdim=True) / 127 + 1e-30)
    back = (rounded.double() - rows.ZERO) * step
    assert ((back - x).abs() <= step * 0.5001).all()
    assert (rounded[count // 2] == rows.ZERO).all()


def test_exp2_is_exact_to_two_units() -> None:
    def write(b: vector.Builder, arguments: vector.Value) -> None:
        count, x, y = (b.load(at(b, arguments, i)) for i in range(3))
        x, y = (vector.address(b, place, vector.F32) for place in (x, y))
        with vector.loop(b, vector.I64(0), count) as i:
            store(b, vector.exp2(b, load(b, at(b, x, (i, WIDTH)))), at(b, y, (i, WIDTH)))

    x = torch.cat([torch.linspace(-126, 126, 1 << 16), torch.tensor([torch.nan] * 8 + [-200.0] * 8)])
    y = torch.empty_like(x)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        vector.Kernel(write)(np.array([len(x) // WIDTH, x.data_ptr(), y.data_ptr()]))
    finally:
        torch.set_num_threads(threads)
    wanted = x[:-16].double().exp2()
    assert ((y[:-16] - wanted) / wanted).abs().max() < 2 * 2**-23
    assert y[-16:-8].isnan().all() and (y[-8:] == 2.0**-126).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_row_is_computed_once_by_any_number_of_threads(threads: int) -> None:
    x = torch.randn(301, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        residual = x.clone()
        rows.add_rmsnorm(residual, x, torch.ones(64), 1e-5)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(residual, x + x)
