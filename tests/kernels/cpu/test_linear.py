"""The CPU linears against float32 matmul on the dequantised weights."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu.linear import Linear, Plan, cpu_features, plan
from kernels.formats import DENSE, dequantize, four_bit_parts

KINDS = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
    "Q4_0": gguf.GGMLQuantizationType.Q4_0,
    "Q4_1": gguf.GGMLQuantizationType.Q4_1,
}
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative error of a matmul's result


def stored(n: int, k: int, kind: str, seed: int = 0) -> torch.Tensor:
    """Random weights as the file holds them: uint8 [n, bytes of a row]."""
    weight = np.random.default_rng(seed).standard_normal((n, k), np.float32) * 0.1
    return torch.from_numpy(gguf.quantize(weight, KINDS[kind]).reshape(n, -1).view(np.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_is_the_gguf_packages(kind: str) -> None:
    raw = stored(16, 96, kind)
    as_file = (
        raw.numpy()
        if kind not in DENSE
        else raw.numpy().view({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8))
    )
    expected = torch.from_numpy(gguf.dequantize(as_file, KINDS[kind])).view(16, 96)
    assert torch.equal(dequantize(raw, kind), expected)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_four_bit_parts(kind: str) -> None:
    raw = stored(32, 64, kind)
    q, d, m = four_bit_parts(raw, kind)
    w = q.float() * d.float().repeat_interleave(32, 1) + m.float().repeat_interleave(32, 1)
    torch.testing.assert_close(w, dequantize(raw, kind), rtol=1e-6, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    rows=st.sampled_from([1, 2, 3, 6, 7, 17, 33, 70]),
    n=st.sampled_from([16, 48, 208]),
    k=st.sampled_from([32, 96, 192]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    invariant=st.booleans(),
    room=st.booleans(),
    bias=st.booleans(),
)
def test_linear(
    kind: str, rows: int, n: int, k: int, dtype: torch.dtype, invariant: bool, room: bool, bias: bool
) -> None:
    raw = stored(n, k, kind)
    chosen = plan(dtype, invariant, spare_bytes=1 << 30 if room else 0, dense_bytes=n * k * 2)
    offset = torch.randn(n) if bias else None
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows))
    y = Linear(raw, kind, offset, chosen)(x)
    assert y.shape == (rows, n) and y.dtype == chosen.dtype(rows)
    expected = x @ dequantize(raw, kind).T + (offset if offset is not None else 0)
    # Weights, inputs, sums and the result are each rounded to the dtype; 4-bit scales to bf16.
    error = (y.float() - expected).norm() / expected.norm()
    assert error < 2 * ROUNDING[y.dtype], error


@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(576, 576), (960, 576), (576, 1536)])
def test_batch_invariant(kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """A row's result has the same bits whatever the number of rows and its place among them."""
    linear = Linear(stored(*shape, kind), kind, None, plan(dtype, True, 1 << 40, 1))
    x = torch.randn(130, shape[1])
    whole = linear(x)
    for rows in (1, 2, 3, 6, 7, 16, 31, 64, 129):
        for start in (0, 1, 130 - rows):
            assert torch.equal(linear(x[start : start + rows]), whole[start : start + rows]), (rows, start)


def test_plan() -> None:
    exact = plan(torch.float32, True, 0, 1 << 40)
    assert exact == Plan(torch.float32, torch.float32, 0, False, True)
    without_room = plan(torch.bfloat16, False, spare_bytes=0, dense_bytes=1 << 30)
    assert without_room.four_bit and without_room.dtype(10_000) == torch.bfloat16
    fast = plan(torch.bfloat16, False, spare_bytes=1 << 40, dense_bytes=1 << 30)
    assert fast.dtype(1) == torch.bfloat16
    assert fast.dtype(512) == (
        torch.bfloat16 if "amx" in cpu_features() else torch.float16 if "fp16" in cpu_features() else torch.float32
    )
