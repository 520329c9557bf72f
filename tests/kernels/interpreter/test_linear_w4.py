"""4-bit matmul in the interpreter: layouts, file formats, and the kernel against the float32 oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.gpu import linear, linear_w4, w4_layout
from kernels.gpu.linear_w4 import Tile
from kernels.gpu.tiles import H100
from kernels.oracle import linear_w4 as oracle

GROUPS = (32, 64, 128, "channel")


def random_parts(
    n: int, k: int, group: int, *, zero_point: bool = False, spread: float = 0.5, seed: int = 0
) -> w4_layout.Parts:
    """Random q, d, m (or zero points); `spread`: standard deviation of the scales' logarithm."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=rng)
    d = (
        (torch.rand(n, k // group, generator=rng) + 0.5)
        * 0.01
        * torch.exp(torch.randn(n, k // group, generator=rng) * spread)
    ).half()
    if zero_point:
        return q, d, torch.randint(0, 17, d.shape, generator=rng).half(), True
    return q, d, (-7.5 * d + d * torch.randn(d.shape, generator=rng)).half(), False


def run(
    x: torch.Tensor, parts: w4_layout.Parts, kw: int, tile: Tile | None, dtype: torch.dtype, x_exp: int = 0
) -> torch.Tensor:
    """The kernel on poisoned output and workspace, twice (the counters must come back to zero), with a canary row
    behind the output."""
    weight = w4_layout.pack(*parts[:3], kw=kw, zero_point=parts[3])
    workspace = linear_w4.Workspace(H100, "cpu")
    workspace.partials.fill_(float("nan"))
    out = torch.full((x.shape[0] + 1, weight.n), float("nan"), dtype=dtype)
    out[-1] = 7
    results = []
    for _ in range(2 if tile is None or tile.split > 1 else 1):
        linear_w4.w4a16(x, weight, out[:-1], workspace, x_exp=x_exp, tile=tile)
        results.append(out[:-1].clone())
    assert torch.equal(results[0], results[-1]) and not workspace.counters.any() and (out[-1] == 7).all()
    return results[0]


def relative(y: torch.Tensor, reference: torch.Tensor) -> float:
    return ((y.float() - reference).norm() / reference.norm()).item()


# Layout


@pytest.mark.parametrize("kw", (2, 4))
def test_every_nibble_has_its_own_place(kw: int) -> None:
    """One weight of 15 among zeros, at every position of a 16 x 128 tile: four bits set in one word, and it comes
    back."""
    seen = set()
    q = torch.zeros(16, 128, dtype=torch.uint8)
    one = torch.ones(16, 4)
    for position in range(q.numel()):
        q.view(-1)[position] = 15
        weight = w4_layout.pack(q, one, one, kw=kw)
        words = weight.words.view(torch.int32).view(-1).long() & 0xFFFFFFFF
        (index,) = words.nonzero().tolist()
        assert words[index[0]].item().bit_count() == 4
        seen.add((index[0], words[index[0]].item()))
        assert torch.equal(w4_layout.unpack(weight)[0], q)
        q.view(-1)[position] = 0
    assert len(seen) == q.numel()


@pytest.mark.parametrize("kw", (2, 4))
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("zero_point", (False, True))
def test_pack_round_trip_is_exact(kw: int, group: int | str, zero_point: bool) -> None:
    k = 192 if group == "channel" else 256
    parts = random_parts(48, k, k if group == "channel" else group, zero_point=zero_point)
    weight = w4_layout.pack(*parts[:3], kw=kw, zero_point=zero_point)
    q, d, m = w4_layout.unpack(weight)
    assert torch.equal(q, parts[0]) and torch.equal(d, parts[1].float())
    if zero_point:
        assert torch.equal(m, parts[2].float())
    else:  # m * 2^-e may round where it is far smaller than the tensor's largest scale
        torch.testing.assert_close(m, parts[2].float(), rtol=0, atol=2.0**-25 * weight.alpha)
    assert weight.bytes == 48 * k // 2 + parts[1].numel() * 4


# File formats: each made by hand from integers, as its project writes it


# Kernel


@pytest.mark.parametrize("kw", (2, 4))
@pytest.mark.parametrize(
    ("group", "block_k"), ((32, 64), (32, 128), (64, 64), (64, 128), (128, 128), (128, 64), (384, 128), (384, 64))
)
@pytest.mark.parametrize("zero_point", (False, True))
def test_weights_bit_for_bit(kw: int, group: int, block_k: int, zero_point: bool) -> None:
    """The identity as x shows the weights: each is the fp16 rounding of w / alpha."""
    k = 384 if group == 384 else 128
    parts = random_parts(64, k, group, zero_point=zero_point, spread=1.0)
    alpha = w4_layout.pack(*parts[:3], kw=kw, zero_point=zero_point).alpha
    y = run(torch.eye(k).half(), parts, kw, Tile(128, 64, block_k, 1, 4, 3), torch.float32)
    assert torch.equal(y, oracle.as_fp16(oracle.dequantise(*parts), alpha).t())


@pytest.mark.parametrize("scale", (2.0**-24, 0.25, 60000.0))
def test_extreme_scales(scale: float) -> None:
    parts = (*random_parts(64, 64, 32)[:1], torch.full((64, 2), scale).half(), torch.zeros(64, 2).half(), False)
    y = run(torch.eye(64).half(), parts, 2, Tile(64, 64, 64, 1, 4, 3), torch.float32)
    assert relative(y, oracle.dequantise(*parts).t()) < 5e-4


@given(
    m=st.integers(1, 40),
    n16=st.integers(1, 13),
    k64=st.integers(1, 6),
    group=st.sampled_from((32, 64, "channel")),
    zero_point=st.booleans(),
    split=st.integers(1, 5),
    block_m=st.sampled_from((8, 16, 32)),
    kw=st.sampled_from((2, 4)),
    dtypes=st.sampled_from(
        ((torch.float16, torch.float16), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32))
    ),
)
def test_any_shape_and_split(m, n16, k64, group, zero_point, split, block_m, kw, dtypes) -> None:
    n, k = n16 * 16, k64 * 64
    parts = random_parts(n, k, k if group == "channel" else group, zero_point=zero_point)
    x_exp = 4 if dtypes[0] == torch.bfloat16 else 0
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtypes[0])
    reference = oracle.linear(x, oracle.dequantise(*parts))
    y = run(x, parts, kw, Tile(block_m, 64, 64, min(split, k64), 4, 3), dtypes[1], x_exp)
    rounding = {torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9, torch.float32: 0}[dtypes[1]]
    assert relative(y, reference) < 2 * 3e-4 + rounding
    if split > 1:  # the split changes nothing beyond rounding
        whole = run(x, parts, kw, Tile(block_m, 64, 64, 1, 4, 3), dtypes[1], x_exp)
        assert relative(y, whole.float()) < 1e-6 + 2 * rounding


def test_row_is_the_same_alone_and_in_a_batch() -> None:
    parts = random_parts(80, 256, 32)
    x = torch.randn(17, 256, generator=torch.Generator().manual_seed(0)).half()
    tile = Tile(16, 64, 64, 2, 4, 3)
    y = run(x, parts, 2, tile, torch.float16)
    assert torch.equal(run(x[16:], parts, 2, tile, torch.float16), y[16:])


def test_scaled_activations() -> None:
    """x stored as x * 2^-4: the output comes out unscaled."""
    parts = random_parts(64, 128, 32)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)) * 100
    y = run((x * 2.0**-4).half(), parts, 2, None, torch.float32, x_exp=4)
    assert relative(y, oracle.linear(x, oracle.dequantise(*parts))) < 1e-3


@pytest.mark.parametrize("zero_point", (False, True))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_dequantise_and_large_m(zero_point: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = random_parts(80, 128, 32, zero_point=zero_point)
    weight = w4_layout.pack(*parts[:3], kw=2, zero_point=zero_point)
    w = oracle.dequantise(*parts)
    dense = torch.full((81, 128), float("nan"), dtype=dtype)
    linear_w4.dequant_w4(weight, dense[:80])
    assert torch.equal(dense[:80], oracle.as_fp16(w, weight.alpha).to(dtype)) and dense[80].isnan().all()
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.full((5, 80), float("nan"), dtype=dtype)
    monkeypatch.setattr(linear_w4, "CROSSOVER", 4)
    linear_w4.config.cache_clear()
    linear.multiply(x, weight, out, linear_w4.Workspace(H100, "cpu"), torch.empty(80 * 128, dtype=dtype))
    linear_w4.config.cache_clear()
    assert relative(out, oracle.linear(x, w)) < (6e-4 if dtype == torch.float16 else 6e-3)
