"""Quantised safetensors folders made from a dense one, in the layouts of AutoAWQ, GPTQ, compressed-tensors and FP8,
each beside the dense folder of the same weights dequantised. Written from the formats' descriptions, not with our own
code, so that the two can disagree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Made = tuple[dict[str, torch.Tensor], torch.Tensor]  # the parts of a linear, and its weights dequantised


def words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers [..., X] -> int32 [..., X * bits / 32], the lowest bits first."""
    per = 32 // bits
    shifts = torch.arange(per) * bits
    packed = (values.long().unflatten(-1, (-1, per)) << shifts).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def integers(w: torch.Tensor, bits: int, group: int, symmetric: bool) -> tuple[torch.Tensor, ...]:
    """w [N, K] to the nearest of 2^bits steps: q in 0 .., fp16 scales and zero points [N, K / group]."""
    x = w.float().unflatten(1, (-1, group))
    top = 2**bits - 1
    if symmetric:
        d = x.abs().amax(-1) / (top // 2)
        z = torch.full_like(d, 2 ** (bits - 1))
    else:
        low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        d = (high - low) / top
        z = (-low / d).round().clamp(1, top)
    d = d.half().float()
    q = (x / d[..., None] + z[..., None]).round().clamp(0, top)
    return q.flatten(1).to(torch.int64), d.half(), z.to(torch.int64)


def dense(q: torch.Tensor, d: torch.Tensor, z: torch.Tensor, g_idx: torch.Tensor) -> torch.Tensor:
    return (q.float() - z.float()[:, g_idx]) * d.float()[:, g_idx]


def awq(w: torch.Tensor) -> Made:
    q, d, z = integers(w, 4, 32, False)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    parts = {
        "qweight": words(q.t().unflatten(1, (-1, 8))[..., order].flatten(1), 4),
        "qzeros": words(z.t().unflatten(1, (-1, 8))[..., order].flatten(1), 4),
        "scales": d.t().contiguous(),
    }
    return parts, dense(q, d, z, torch.arange(w.shape[1]) // 32)


def gptq(w: torch.Tensor, bits: int, symmetric: bool, act_order: bool, v2: bool) -> Made:
    q, d, z = integers(w, bits, 32, symmetric)
    g_idx = torch.arange(w.shape[1]) // 32
    if act_order:
        g_idx = g_idx[torch.randperm(len(g_idx), generator=torch.Generator().manual_seed(len(g_idx)))]
    parts = {
        "qweight": words(q, bits).t().contiguous(),
        "qzeros": words(z.t() - (0 if v2 else 1), bits),
        "scales": d.t().contiguous(),
        "g_idx": g_idx.to(torch.int32),
    }
    return parts, dense(q, d, z, g_idx)


def packed(w: torch.Tensor, bits: int, symmetric: bool, group: int) -> Made:
    q, d, z = integers(w, bits, group or w.shape[1], symmetric)
    parts = {"weight_packed": words(q, bits), "weight_scale": d, "weight_shape": torch.tensor(w.shape)}
    if not symmetric:
        parts["weight_zero_point"] = words(z.t(), bits).t().contiguous()
    return parts, dense(q, d, z, torch.arange(w.shape[1]) // (group or w.shape[1]))


def int8(w: torch.Tensor) -> Made:
    d = (w.float().abs().amax(1, keepdim=True) / 127).bfloat16()
    q = (w.float() / d.float()).round().clamp(-127, 127).to(torch.int8)
    return {"weight": q, "weight_scale": d}, q.float() * d.float()


def fp8(w: torch.Tensor, strategy: str) -> Made:
    n, k = w.shape
    if strategy == "block":
        d = torch.rand(-(-n // 128), -(-k // 128)) * 0.01 + 0.01
        full = d.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    elif strategy == "channel":
        full = d = w.abs().amax(1, keepdim=True) / 448
    else:
        full = d = w.abs().max() / 448
    q = (w / full).clamp(-448, 448).to(torch.float8_e4m3fn)
    parts = {"weight": q, "weight_scale_inv" if strategy == "block" else "weight_scale": d}
    if strategy == "tensor":
        parts["input_scale"] = torch.tensor(0.5)
    return parts, q.float() * full


def compressed(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None,
    }  # fmt: skip


def weights_of(
    bits: int, symmetric: bool, group: int, kind: str = "int", strategy: str | None = None
) -> dict[str, Any]:
    strategy = strategy or ("group" if group else "channel")
    return {"num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy, "group_size": group or None}


GPTQ = {"quant_method": "gptq", "group_size": 32}
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}

# Name -> quantization_config, and what it does to a weight.
KINDS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Made]]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, awq),
    "gptq 4 sym": (GPTQ | {"bits": 4, "desc_act": False, "sym": True}, lambda w: gptq(w, 4, True, False, False)),
    "gptq 4 act-order": (GPTQ | {"bits": 4, "desc_act": True, "sym": False}, lambda w: gptq(w, 4, False, True, False)),
    "gptq 4 v2": (GPTQ | {"bits": 4, "checkpoint_format": "gptq_v2"}, lambda w: gptq(w, 4, False, False, True)),
    "gptq 8 sym": (GPTQ | {"bits": 8}, lambda w: gptq(w, 8, True, False, False)),
    "gptq 8 act-order": (GPTQ | {"bits": 8}, lambda w: gptq(w, 8, False, True, False)),
    "w4a16 sym": (compressed("pack-quantized", weights_of(4, True, 32)), lambda w: packed(w, 4, True, 32)),
    "w4a16 asym": (compressed("pack-quantized", weights_of(4, False, 32)), lambda w: packed(w, 4, False, 32)),
    "w4a16 channel": (compressed("pack-quantized", weights_of(4, True, 0)), lambda w: packed(w, 4, True, 0)),
    "w8a16 channel": (compressed("pack-quantized", weights_of(8, True, 0)), lambda w: packed(w, 8, True, 0)),
    "w8a16 group asym": (compressed("pack-quantized", weights_of(8, False, 32)), lambda w: packed(w, 8, False, 32)),
    "w8a16 int": (compressed("int-quantized", weights_of(8, True, 0)), int8),
    "fp8 channel": (
        compressed("float-quantized", weights_of(8, True, 0, "float"), TOKENS | {"type": "float"}),
        lambda w: fp8(w, "channel"),
    ),
    "fp8 tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, lambda w: fp8(w, "tensor")),
    "fp8 block": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        lambda w: fp8(w, "block"),
    ),
    "w8a8": (compressed("int-quantized", weights_of(8, True, 0), TOKENS), int8),
}  # fmt: skip


def zero_biases(folder: Path, fill: float = 0.0) -> None:
    """A bias for every quantised linear, as AutoGPTQ writes it."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".qweight")]:
        rows = tensors[name].shape[1]
        tensors[name.replace("qweight", "bias")] = torch.full((rows,), fill, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def quantise(source: Path, kind: str, folder: Path) -> tuple[Path, Path]:
    """The folder's linears in the layout `kind`, and the same weights dequantised: two folders under `folder`."""
    config, make = KINDS[kind]
    torch.manual_seed(0)
    tensors = load_file(source / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".layers." not in name or tensor.ndim != 2:
            stored[name] = plain[name] = tensor
            continue
        parts, plain[name] = make(tensor)
        plain[name] = plain[name].contiguous()
        stored |= {name.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
    made = []
    for name, values, extra in (("quantised", stored, {"quantization_config": config}), ("dense", plain, {})):
        shutil.copytree(source, folder / name)
        save_file(values, folder / name / "model.safetensors", {"format": "pt"})
        settings = json.loads((source / "config.json").read_text()) | extra
        (folder / name / "config.json").write_text(json.dumps(settings))
        made.append(folder / name)
    return made[0], made[1]
