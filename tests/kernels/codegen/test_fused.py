"""Fused element-wise kernels: 128-bit accesses, no spills, one launch each, no recompilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import kv_cache
from kernels.gpu import fused
from tests.kernels.support import fake_driver
from tests.kernels.support.codegen import MachineCode, compile_only

GPUS = (80, 89, 90)


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, warps: int) -> MachineCode:
    strides = [name for name in kernel.arg_names if name.startswith("s_")]
    types = types | dict.fromkeys(strides, "i32")
    code = MachineCode(
        compile_only(kernel, types, constants, capability, num_warps=warps, num_stages=3, divisible_by_16=strides)
    )
    assert code.spills == 0
    return code


def only_wide(code: MachineCode, opcode: str) -> bool:
    return code.widths(opcode)["128"] == code.count[opcode] > 0


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize(("h", "warps"), ((576, 2), (4096, 8)))
def test_add_rmsnorm(capability: int, h: int, warps: int) -> None:
    types = dict(X="*fp16", residual="*bf16", weight="*bf16", out="*fp16", eps="fp32", out_scale="fp32")
    constants = dict(H=h, BLOCK=1 << (h - 1).bit_length(), ADD=True)
    code = compiled(fused.add_rmsnorm_kernel, types, constants, capability, warps)
    assert only_wide(code, "LDG") and only_wide(code, "STG") and code.registers <= 128


@pytest.mark.parametrize("capability", GPUS)
def test_silu_mul(capability: int) -> None:
    types = dict(gate_up="*bf16", out="*fp16", out_scale="fp32")
    code = compiled(fused.silu_mul_kernel, types, dict(INNER=14336, BLOCK=1024), capability, 4)
    assert only_wide(code, "LDG") and only_wide(code, "STG") and code.registers <= 64


@pytest.mark.parametrize(
    ("capability", "cache", "qmax", "norm"),
    (
        (80, "bf16", 0.0, False),
        (80, "i8", 127.0, True),
        (89, "fp8e4nv", 448.0, False),
        (90, "bf16", 0.0, True),
        (90, "fp8e4nv", 448.0, True),
    ),
)
def test_rope_and_cache_write(capability: int, cache: str, qmax: float, norm: bool) -> None:
    types = dict(
        qkv="*bf16", positions="*i32", slots="*i64", cos_sin="*fp32", q_weight="*bf16", k_weight="*bf16", eps="fp32"
    )
    types |= dict(K=f"*{cache}", V=f"*{cache}", K_SCALE="*fp32", V_SCALE="*fp32")
    constants: dict[str, Any] = dict(H=32, HKV=8, D=128, PAGE=64, BH=8, BD=128, NORM=norm, QMAX=qmax)
    if not norm:
        constants |= dict(q_weight=None, k_weight=None)
    if not qmax:
        constants |= dict(K_SCALE=None, V_SCALE=None)
    code = compiled(fused.rope_kernel, types, constants, capability, 4)
    assert code.widths("LDG")["128"] and code.registers <= 128
    if qmax:  # V is stored along its tokens, scales are single numbers
        assert code.widths("STG")["128"] > 0
    else:
        assert only_wide(code, "STG")
    assert not code.count["SHFL"] or norm or qmax  # pairs are neighbours in a thread: no exchange for the rotation


def test_one_launch_each_and_no_recompilation() -> None:
    driver = fake_driver.install(90)
    cache = kv_cache.allocate(4, 3, 64, 64, torch.bfloat16)
    table, weight = torch.zeros(100, 32, 2), torch.zeros(576)
    kernels = (fused.add_rmsnorm_kernel, fused.silu_mul_kernel, fused.rope_kernel)
    before = [fake_driver.variants(k) for k in kernels]
    for calls, m in enumerate((1, 2, 7, 16, 33), 1):
        x = torch.zeros(m, 576, dtype=torch.bfloat16)
        fused.add_rmsnorm(x, x, weight, x.half(), eps=1e-5)
        fused.silu_mul(torch.zeros(m, 3072).bfloat16(), torch.zeros(m, 1536).half(), out_exp=4)
        indices = torch.zeros(m, dtype=torch.int32)
        fused.rope_and_cache_write(torch.zeros(m, 15 * 64).bfloat16(), indices, indices, table, cache, 9)
        assert dict(driver.launches) == dict.fromkeys(("add_rmsnorm_kernel", "silu_mul_kernel", "rope_kernel"), calls)
    assert [fake_driver.variants(k) for k in kernels] == [n + 1 for n in before]
