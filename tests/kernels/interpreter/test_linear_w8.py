"""8-bit matmul in the interpreter: every stored format, tiles, splits and dtypes against the float32 oracle."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoint.tensors import BLOCKS
from engine.planner import GPU_BYTES
from kernels.formats import Weight, decode, dequantize
from kernels.gpu import fused, linear, linear_w4, linear_w8, w4_layout
from kernels.gpu.split_k import Tile, Workspace
from kernels.gpu.tiles import A100, H100
from kernels.oracle import linear_w8 as oracle

FP16, BF16, FP32, INT8, FP8 = torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn
ROUNDING = {FP16: 2.0**-12, BF16: 2.0**-9, FP32: 0.0}
GROUPS = 4e-4  # twice what weights rounded to fp16 once cost


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_weight(n: int, k: int, group: int, dtype: torch.dtype = INT8, minimum: bool = False) -> Weight:
    rng = torch.Generator().manual_seed(n + k)
    q = torch.randint(-128, 128, (n, k), dtype=INT8, generator=rng) if dtype == INT8 else normal(n, k).mul_(99).to(FP8)
    d = (torch.rand(n, -(-k // group), generator=rng) + 0.1) * 0.01
    m = torch.randn(d.shape, generator=rng) * 0.1 if minimum else None
    return Weight(q, d, m, group=group, bits=8)


def run(
    x: torch.Tensor, weight: linear_w8.W8, dtype: torch.dtype, tile: Tile | None = None, x_exp: int = 0
) -> torch.Tensor:
    """On poisoned output and workspace, with a canary row behind the output; the counters must come back to zero."""
    workspace = Workspace(H100, "cpu")
    workspace.partials.fill_(float("nan"))
    out = torch.full((x.shape[0] + 1, weight.n), float("nan"), dtype=dtype)
    out[-1] = 7
    multiply = linear_w8.w8a8 if weight.eight_bit_input else linear_w8.w8a16
    multiply(x, weight, out[:-1], workspace, x_exp=x_exp, tile=tile)
    assert not workspace.counters.any() and (out[-1] == 7).all()
    return out[:-1]


def relative(y: torch.Tensor, reference: torch.Tensor) -> float:
    return ((y.float() - reference).norm() / reference.norm()).item()


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 200),
    k32=st.integers(1, 9),
    group=st.sampled_from((16, 32, 64, 128, "row")),
    minimum=st.booleans(),
    split=st.integers(1, 5),
    block_m=st.sampled_from((16, 32)),
    weights=st.sampled_from(((INT8, 90), (FP8, 90), (FP8, 80))),
    dtypes=st.sampled_from(((FP16, FP16), (FP16, BF16), (BF16, FP32))),
)
def test_any_shape_and_split(m, n, k32, group, minimum, split, block_m, weights, dtypes) -> None:
    """fp8's last group of 128 may be shorter; on sm_80 fp8 is read by its bits."""
    k = k32 * 32
    group = k if group == "row" else min(group, k)
    block_k = next((b for b in (64, 32) if k % b == 0 and (b % group == 0 or group % b == 0)), None)
    weight = random_weight(n, k, group, weights[0], minimum)
    assert linear_w8.fits(weight) == (block_k is not None)
    if block_k is None:
        return
    packed = linear_w8.pack(weight, weights[1])
    x_exp = 4 if dtypes[0] == BF16 else 0
    x = normal(m, k, seed=m).to(dtypes[0])
    tile = Tile(block_m, 64, block_k, min(split, k // block_k), 4, 3)
    y = run(x, packed, dtypes[1], tile, x_exp)
    exact = oracle.linear(x, dequantize(weight))
    assert relative(y, exact) < (1e-6 if packed.per_row else GROUPS) + 2 * ROUNDING[dtypes[1]]


@given(
    m=st.integers(1, 20),
    n=st.integers(1, 150),
    k32=st.integers(1, 9),
    split=st.integers(1, 4),
    dtype=st.sampled_from((INT8, FP8)),
    dtypes=st.sampled_from(((FP16, FP16), (BF16, BF16), (FP32, FP32))),
)
def test_eight_bit_activations(m, n, k32, split, dtype, dtypes) -> None:
    """Against the oracle that rounds x as well: whole numbers are exact, and so are products of fp8 in float32."""
    k = k32 * 32
    weight = dataclasses.replace(random_weight(n, k, k, dtype), eight_bit_input=True)
    x = normal(m, k, seed=m).to(dtypes[0])
    x[0] = 0
    y = run(x, linear_w8.pack(weight, 90), dtypes[1], Tile(16, 64, 32, min(split, k32), 4, 3))
    exact = oracle.linear(x, dequantize(weight), dtype)
    assert not y[0].any()
    if m > 1:
        assert relative(y, exact) < 1e-6 + 2 * ROUNDING[dtypes[1]]


@pytest.mark.parametrize("dtype", (INT8, FP8))
@pytest.mark.parametrize("k", (1, 100, 576))
def test_quantise_rows(dtype: torch.dtype, k: int) -> None:
    x = torch.cat([normal(3, k) * 10.0 ** torch.arange(-3, 3, 2)[:, None], torch.zeros(1, k)]).half()
    out, scales = torch.empty(4, k, dtype=dtype), torch.full((4, 1), float("nan"))
    fused.quantise_rows(x, out, scales)
    q, expected = oracle.quantise_rows(x, dtype)
    assert torch.equal(scales, expected) and torch.equal(out.view(torch.uint8), q.view(torch.uint8))


def test_a_row_that_is_not_finite_stays_so() -> None:
    weight = linear_w8.pack(dataclasses.replace(random_weight(32, 64, 64), eight_bit_input=True), 90)
    x = torch.ones(3, 64).half()
    x[0, 5], x[2, 9] = float("nan"), float("inf")
    y = run(x, weight, FP16)
    assert y[0].isnan().all() and y[1].isfinite().all() and not y[2].isfinite().any()


def blocks(kind: str, n: int, count: int) -> torch.Tensor:
    """uint8 [n, bytes of `count` blocks]: random bytes with small scales, minima that bring the mean near zero."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (n, count, BLOCKS[kind][1]), np.uint8)
    scale = (rng.random((n, count)) + 0.5) * {"4": 3e-3, "5": 2e-3, "6": 2e-4, "8": 1e-3}[kind[1]]
    middle = 2.0 ** (int(kind[1]) - 1) - 0.5
    halves = {208 if kind == "Q6_K" else 0: scale}
    if kind[2:] == "_1" or kind in ("Q4_K", "Q5_K"):
        halves[2] = middle * scale * (-1 if kind[2:] == "_1" else 1)
    for at, values in halves.items():
        raw[..., at : at + 2] = values.astype(np.float16)[..., None].view(np.uint8)
    return torch.from_numpy(raw.reshape(n, -1))


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind.startswith("Q")])
def test_gguf_formats(kind: str) -> None:
    """4 bits in the 4-bit layout, whose scales are fp16: those of Q4_K, d s with 17 bits, are rounded to it. The rest
    in bytes with float32 scales: nothing but the weight itself is rounded, once, to fp16."""
    count = 512 // BLOCKS[kind][0]
    weight = decode(kind, {"": blocks(kind, 48, count)})
    x = normal(3, 512).half()
    exact = oracle.linear(x, dequantize(weight))
    out = torch.empty(3, 48)
    if weight.bits == 4:
        q, d, m, zero_point = w4_layout.parts(weight)
        packed: w4_layout.W4 | linear_w8.W8 = w4_layout.pack(q, d, m, kw=2, zero_point=zero_point)
        linear_w4.w4a16(x, packed, out, Workspace(H100, "cpu"))
        assert relative(out, exact) < (8e-4 if kind == "Q4_K" else GROUPS)
    else:
        packed = linear_w8.pack(weight, 90)
        dense = torch.empty(48, 512)
        linear_w8.dequant_w8(packed, dense)
        torch.testing.assert_close(dense, dequantize(weight), rtol=3e-7, atol=1e-7)
        linear_w8.w8a16(x, packed, out, Workspace(H100, "cpu"))
        assert relative(out, exact) < GROUPS
    assert packed.bytes == 48 * 512 * GPU_BYTES[kind]  # what the planner reckons with


@pytest.mark.parametrize("capability", (80, 90))
def test_every_fp8_number(capability: int) -> None:
    """By its bits or by the instruction: the identity shows the weights."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8)
    numbers[[127, 255]] = 0  # NaN
    weight = Weight(numbers.view(8, 32), torch.full((8, 1), 0.5), group=32, bits=8)
    y = run(torch.eye(32).half(), linear_w8.pack(weight, capability), FP32)
    assert torch.equal(y.t(), numbers.view(8, 32).float() * 0.5)


def test_row_is_the_same_alone_and_in_a_batch() -> None:
    x = normal(17, 256).half()
    for weight in (random_weight(80, 256, 32), dataclasses.replace(random_weight(80, 256, 256), eight_bit_input=True)):
        packed, tile = linear_w8.pack(weight, 90), Tile(16, 64, 64, 2, 4, 3)
        assert torch.equal(run(x[16:], packed, FP16, tile), run(x, packed, FP16, tile)[16:])


@pytest.mark.parametrize("group", (32, 256))
def test_scaled_activations(group: int) -> None:
    """x stored as x * 2^-4 in fp16, and bf16 x that is scaled on its way: the output comes out unscaled."""
    weight = random_weight(64, 256, group)
    x = (normal(4, 256) * 100).bfloat16()
    exact = oracle.linear(x, dequantize(weight))
    packed = linear_w8.pack(weight, 90)
    for stored in ((x.float() * 2.0**-4).half(), x):
        assert relative(run(stored, packed, FP32, x_exp=4), exact) < GROUPS
    eight = linear_w8.pack(dataclasses.replace(random_weight(64, 256, 256), eight_bit_input=True), 90)
    a, b = (run(stored, eight, FP32, x_exp=4) for stored in ((x.float() * 2.0**-4).half(), x))
    assert relative(a, b) < 1e-6


@pytest.mark.parametrize("dtype", (FP16, BF16))
@pytest.mark.parametrize("kind", ("groups", "int8", "fp8"))
def test_many_rows(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the cross-over: dequantised for torch.mm, or torch's products of 8 bits (fp8 gives bf16 alone)."""
    monkeypatch.setattr(linear_w8, "CROSSOVER", 4)
    monkeypatch.setattr(linear_w8, "LIBRARY", 16)
    linear_w8.config.cache_clear()
    rows = 24  # torch._int_mm wants more than 16
    eight = {"int8": INT8, "fp8": FP8}.get(kind)
    weight = random_weight(80, 128, 128 if eight else 32, eight or INT8)
    packed = linear_w8.pack(dataclasses.replace(weight, eight_bit_input=eight is not None), 90)
    x, out = normal(rows, 128).to(dtype), torch.full((rows, 80), float("nan"), dtype=dtype)
    linear.multiply(x, packed, out, Workspace(H100, "cpu"), torch.empty(80 * 128, dtype=dtype))
    linear_w8.config.cache_clear()
    assert relative(out, oracle.linear(x, dequantize(weight), eight)) < (6e-4 if dtype == FP16 else 6e-3)


def test_what_there_is_no_kernel_for() -> None:
    assert not linear_w8.fits(Weight(torch.zeros(4, 48, dtype=INT8), torch.ones(4, 1), group=48, bits=8))
    assert not linear_w8.fits(Weight(torch.zeros(4, 96, dtype=INT8), torch.ones(4, 2), group=48, bits=8))
    eight = dataclasses.replace(random_weight(8, 64, 64, FP8), eight_bit_input=True)
    assert linear_w8.takes_eight_bits(eight, 89) and not linear_w8.takes_eight_bits(eight, 80)
    with pytest.raises(ValueError, match="no float8"):
        linear_w8.config(1, 64, 64, 64, FP8, A100)
