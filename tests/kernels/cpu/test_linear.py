"""The CPU linears against float32 matmul on the dequantised weights."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu.linear import Linear, Plan, cpu_features, plan
from kernels.formats import Weight, decode, dequantize

KINDS = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
    "Q4_0": gguf.GGMLQuantizationType.Q4_0,
    "Q4_1": gguf.GGMLQuantizationType.Q4_1,
    "Q5_1": gguf.GGMLQuantizationType.Q5_1,
}
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative error of a matmul's result


def stored(n: int, k: int, kind: str, seed: int = 0) -> Weight:
    """Random weights of a format."""
    values = np.random.default_rng(seed).standard_normal((n, k), np.float32) * 0.1
    if kind in KINDS:
        return decode(kind, {"": torch.from_numpy(gguf.quantize(values, KINDS[kind]).reshape(n, -1).view(np.uint8))})
    w = torch.from_numpy(values)
    if kind == "FP8":
        return decode(kind, {"weight": (w * 100).to(torch.float8_e4m3fn), "weight_scale": torch.tensor(0.01)})
    scale = w.abs().amax(1, keepdim=True) / 127
    return decode(kind, {"weight": (w / scale).round().to(torch.int8), "weight_scale": scale})


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([*KINDS, "INT8", "W8A8", "FP8"]),
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
    weight = stored(n, k, kind)
    chosen = plan(dtype, invariant, spare_bytes=1 << 30 if room else 0, dense_bytes=n * k * 2)
    offset = torch.randn(n) if bias else None
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows))
    y = Linear(weight, offset, chosen)(x)
    assert y.shape == (rows, n) and y.dtype == chosen.dtype(rows)
    expected = x @ dequantize(weight).T + (offset if offset is not None else 0)
    # Weights, inputs, sums and the result are each rounded to the dtype; 4-bit scales to bf16.
    error = (y.float() - expected).norm() / expected.norm()
    assert error < (2e-2 if kind == "W8A8" else 2 * ROUNDING[y.dtype]), error


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_int8_activations(rows: int, vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """W8A8 is exact but for the rounding of its activations, one step of 127 a row; with VNNI and without."""
    features = cpu_features() if vnni else cpu_features() - {"vnni"}
    monkeypatch.setattr("kernels.cpu.linear.cpu_features", lambda: features)
    weight = stored(48, 96, "W8A8")
    x = torch.randn(rows, 96)
    x[0] = 0
    step = (x.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    expected = (x / step).round() * step @ dequantize(weight).T
    found = Linear(weight, None, plan(torch.float32, True, 0, 1))(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["F32", "Q4_1", "INT8", "W8A8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(576, 576), (960, 576), (576, 1536)])
def test_batch_invariant(kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """A row's result has the same bits whatever the number of rows and its place among them."""
    linear = Linear(stored(*shape, kind), None, plan(dtype, True, 1 << 40, 1))
    x = torch.randn(130, shape[1])
    whole = linear(x)
    for rows in (1, 2, 3, 6, 7, 16, 31, 64, 129):
        for start in (0, 1, 130 - rows):
            assert torch.equal(linear(x[start : start + rows]), whole[start : start + rows]), (rows, start)


def test_plan() -> None:
    exact = plan(torch.float32, True, 0, 1 << 40)
    assert exact == Plan(torch.float32, torch.float32, 0, False, True)
    without_room = plan(torch.bfloat16, False, spare_bytes=0, dense_bytes=1 << 30)
    assert without_room.quantized and without_room.dtype(10_000) == torch.bfloat16
    fast = plan(torch.bfloat16, False, spare_bytes=1 << 40, dense_bytes=1 << 30)
    assert fast.dtype(1) == torch.bfloat16
    assert fast.dtype(512) == (
        torch.bfloat16 if "amx" in cpu_features() else torch.float16 if "fp16" in cpu_features() else torch.float32
    )
