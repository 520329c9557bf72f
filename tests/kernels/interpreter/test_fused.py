"""Fused element-wise kernels in the interpreter against the float32 oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import kv_cache
from kernels.gpu import fused
from kernels.gpu.epilogue import TURN, in_turns
from kernels.oracle import fused as oracle
from kernels.oracle import linear_w8 as linear_oracle

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = {torch.float32: 2.0**-21, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # one rounding, relative


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(y: torch.Tensor, reference: torch.Tensor) -> None:
    """y is the reference rounded to y's dtype, give or take the last float32 bits before that."""
    torch.testing.assert_close(y.float(), reference, rtol=EPS[y.dtype] + 1e-6, atol=2e-7)


def poisoned(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """NaN with a canary row of sevens behind."""
    out = torch.full((rows + 1, columns), float("nan"), dtype=dtype)
    out[-1] = 7
    return out


@settings(max_examples=40)
@given(
    m=st.integers(1, 4),
    h=st.sampled_from((16, 576, 960, 1000, 4096)),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    out_exp=st.integers(0, 4),
    add=st.booleans(),
)
def test_add_rmsnorm(m: int, h: int, dtypes: tuple[torch.dtype, ...], out_exp: int, add: bool) -> None:
    x_dtype, residual_dtype, out_dtype = dtypes
    out_exp = out_exp if out_dtype == torch.float16 else 0
    x = normal(m, h, dtype=x_dtype) if add else None
    residual, weight = normal(m + 1, h, seed=1, dtype=residual_dtype) * 3, normal(h, seed=2)
    before = residual.clone()
    want_residual, want = oracle.add_rmsnorm(x, residual[:m], weight, 1e-5)
    out = poisoned(m, h, out_dtype)
    fused.add_rmsnorm(x, residual[:m], weight, out[:m], eps=1e-5, out_exp=out_exp)
    assert torch.equal(residual[:m], want_residual) and torch.equal(residual[m], before[m]) and (out[m] == 7).all()
    close(out[:m], want * 2.0**-out_exp)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@settings(max_examples=30)
@given(
    m=st.integers(1, 3),
    inner=st.sampled_from((16, 1536, 1000, 2064)),
    dtype=st.sampled_from(DTYPES),
    turns=st.booleans(),
)
def test_silu_mul(m: int, inner: int, dtype: torch.dtype, turns: bool) -> None:
    gate_up = (normal(m, 2 * inner) * 4).to(dtype)
    gate_up[0, 0], gate_up[0, 1] = -200, 200  # exp overflows; silu is 0 and the identity there
    out = poisoned(m, inner, dtype)
    given = in_turns(gate_up.t()).t().contiguous() if turns else gate_up
    fused.silu_mul(given, out[:m], turn=TURN if turns else None)
    close(out[:m], oracle.silu_mul(gate_up))
    assert (out[m] == 7).all()


@settings(max_examples=20)
@given(
    m=st.integers(1, 3), columns=st.sampled_from((64, 576, 1000)),
    dtype=st.sampled_from((torch.int8, torch.float8_e4m3fn)), turns=st.booleans(),
)  # fmt: skip
def test_rows_in_eight_bits(m: int, columns: int, dtype: torch.dtype, turns: bool) -> None:
    """Norm and silu write what rounding their float32 results would."""

    def check(found: fused.Rounded, exact: torch.Tensor) -> None:
        want, scales = linear_oracle.quantise_rows(exact, dtype)
        torch.testing.assert_close(found.scales, scales, rtol=1e-5, atol=0)
        apart = (found.q.float() - want.float()).abs()  # what is nearly a tie may round to either side
        assert (apart <= (1 if dtype is torch.int8 else 32)).all() and (apart > 0).float().mean() < 0.02

    residual, weight = normal(m, columns, seed=1) * 3, normal(columns, seed=2)
    out = fused.Rounded.empty(m, columns, dtype, torch.device("cpu"))
    _, exact = oracle.add_rmsnorm(None, residual, weight, 1e-5)
    fused.add_rmsnorm(None, residual, weight, out, eps=1e-5)
    check(out, exact)
    gate_up = normal(m, 2 * columns, seed=3) * 2
    given = in_turns(gate_up.t()).t().contiguous() if turns else gate_up
    fused.silu_mul(given, out, turn=TURN if turns else None)
    check(out, oracle.silu_mul(gate_up))


def test_fp16_output_is_scaled_and_saturates() -> None:
    gate_up = torch.tensor([[1e4, 3.0, -50.0, 1e4, 5.0, 7.0]]).bfloat16()
    out = torch.empty(1, 3).half()
    fused.silu_mul(gate_up, out, out_exp=4)
    assert torch.equal(out, oracle.scaled_fp16(oracle.silu_mul(gate_up), 4)) and out[0, 0] == 65504


def cos_sin_table(positions: int, d: int) -> torch.Tensor:
    angle = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
    return torch.stack([angle.cos(), angle.sin()], -1).float()


@pytest.mark.parametrize("cache_dtype", (None, torch.int8, torch.float8_e4m3fn))
@pytest.mark.parametrize("shape", ((9, 3, 64), (4, 4, 96), (8, 1, 128), (14, 2, 64), (16, 4, 128)))
@settings(max_examples=6)
@given(
    tokens=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    page=st.sampled_from((16, 64)),
    norm=st.booleans(),
    seed=st.integers(0, 9),
)
def test_rope_and_cache_write(tokens, shape, dtype, cache_dtype, page, norm, seed) -> None:
    heads, kv_heads, d = shape
    rng = torch.Generator().manual_seed(seed)
    cache = kv_cache.allocate(3, kv_heads, page, d, cache_dtype or dtype)
    qkv = normal(tokens, (heads + 2 * kv_heads) * d, seed=seed, dtype=dtype)
    positions = torch.randint(0, 50, (tokens,), generator=rng, dtype=torch.int32)
    slots = torch.randperm(3 * page, generator=rng)[:tokens].int()
    if tokens > 1:
        slots[1] = -1  # a padded row
    table = cos_sin_table(50, d)
    weights = (normal(d, seed=3), normal(d, seed=4)) if norm else (None, None)
    q, k, v = (t.unflatten(1, (-1, d)) for t in qkv.split([heads * d, kv_heads * d, kv_heads * d], 1))
    want_q = oracle.rope(q, positions, table, weights[0], 1e-6)
    want_k = oracle.rope(k, positions, table, weights[1], 1e-6)
    before = qkv.clone()
    fused.rope_and_cache_write(
        qkv, positions, slots, table, cache, heads, q_weight=weights[0], k_weight=weights[1], eps=1e-6
    )
    real = slots >= 0
    close(q[real], want_q[real])
    assert torch.equal(q[~real], before.unflatten(1, (-1, d))[:, :heads][~real])
    assert torch.equal(qkv[:, heads * d :], before[:, heads * d :])
    got_k, got_v = (t.transpose(1, 2).flatten(0, 1) for t in kv_cache.unpack(cache))  # [slots, kv_heads, d]
    where = slots[real].long()
    for got, want in ((got_k, want_k[real]), (got_v, v[real].float())):
        if cache_dtype is None:
            torch.testing.assert_close(got[where], want, rtol=EPS[dtype] + 1e-6, atol=2e-7)
        else:
            stored, scale = kv_cache.quantize_rows(want, cache_dtype)
            step = scale[..., None] * (
                1.0 if cache_dtype == torch.int8 else 32.0
            )  # the largest step of the 8-bit values
            exact = stored.float() * scale[..., None]
            assert ((got[where] - exact).abs() <= step * 1.001).all()
            assert ((got[where] - exact).abs() > scale[..., None] * 1e-3).float().mean() < 0.01, (
                "only ties may round apart"
            )
        rest = torch.ones(3 * page, dtype=torch.bool)
        rest[where] = False
        assert not got[rest].any(), "another slot was written"


def test_zero_rows_quantise_to_zero() -> None:
    cache = kv_cache.allocate(1, 2, 16, 64, torch.int8)
    cache.k_scale.fill_(5)
    fused.rope_and_cache_write(
        torch.zeros(1, 6 * 64), torch.zeros(1).int(), torch.zeros(1).int(), cos_sin_table(1, 64), cache, 2
    )
    assert not cache.k.any() and not cache.v.any() and (cache.k_scale[0, :, 0] == 0).all()


@pytest.mark.parametrize("dtype", (torch.int8, torch.float8_e4m3fn))
def test_a_row_that_is_not_finite_shows_in_its_scale(dtype: torch.dtype) -> None:
    """And nowhere else: attention masks the scales of an 8-bit cache alone."""
    cache = kv_cache.allocate(1, 2, 16, 64, dtype)
    qkv = torch.ones(1, 6 * 64)
    qkv[0, 3 * 64], qkv[0, 5 * 64] = float("nan"), float("inf")  # in k and in v of the second head
    fused.rope_and_cache_write(qkv, torch.zeros(1).int(), torch.zeros(1).int(), cos_sin_table(1, 64), cache, 2)
    assert cache.k_scale is not None and cache.v_scale is not None
    for scale in (cache.k_scale, cache.v_scale):
        assert scale[0, 1, 0].isnan() and scale[0, 0, 0].isfinite()
    assert cache.k.float().isfinite().all() and cache.v.float().isfinite().all()


def test_row_is_the_same_alone_and_in_a_batch() -> None:
    x, residual, weight = normal(5, 576).half(), normal(5, 576, seed=1).bfloat16(), normal(576, seed=2)
    together, alone = torch.empty(5, 576).half(), torch.empty(1, 576).half()
    fused.add_rmsnorm(x, residual.clone(), weight, together, eps=1e-5)
    fused.add_rmsnorm(x[3:4], residual[3:4].clone(), weight, alone, eps=1e-5)
    assert torch.equal(together[3:4], alone)


def test_bytes_are_those_of_the_tensors() -> None:
    assert fused.add_rmsnorm_bytes_and_flops(3, 8)[0] == sum(t.nbytes for t in [torch.empty(3, 8).half()] * 4) + 16
    assert fused.silu_mul_bytes_and_flops(3, 8)[0] == 3 * 3 * 8 * 2
    qkv, q, cache_rows, angles, indices = 2 * (4 + 2 * 2) * 64, 2 * 4 * 64, 2 * 2 * (64 + 4), 4 * 64, 8
    assert fused.rope_bytes_and_flops(1, 4, 2, 64, 2, 1)[0] == qkv + q + cache_rows + angles + indices


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_shapes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError):
        fused.silu_mul(torch.zeros(2, 30, dtype=dtype), torch.zeros(2, 16, dtype=dtype))
