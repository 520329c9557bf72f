"""Tensor names: the dialects of files, the one this engine uses (Hugging Face's Llama), and what a config expects."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from engine.checkpoint.tensors import StoredTensor
from engine.errors import CheckpointError
from engine.model.config import ModelConfig

_LAYER = "model.layers."

_GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "gate_up": "mlp.gate_up_proj",
}
_YI_LAYER = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}  # Yi's first release


def from_gguf(name: str, fused: bool = False) -> str:
    """GGUF's name -> ours ("blk.3.attn_q.bias" -> "model.layers.3.self_attn.q_proj.bias"); unknown names are kept.

    fused: ffn_up holds gate and up (Phi-3)."""
    if fused:
        name = name.replace(".ffn_up.", ".gate_up.")
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = match.groups()
        return f"{_LAYER}{layer}.{_GGUF_LAYER[part]}.{kind}" if part in _GGUF_LAYER else name
    top, _, kind = name.rpartition(".")
    return f"{_GGUF_TOP[top]}.{kind}" if top in _GGUF_TOP else name


def from_hugging_face(name: str) -> str | None:
    """A safetensors name -> ours; None for a tensor that holds nothing to load (old files store rope's frequencies)."""
    if name.endswith(".rotary_emb.inv_freq"):
        return None
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(ln[12])\.weight", name):
        return f"{_LAYER}{match[1]}.{_YI_LAYER[match[2]]}.weight"
    return name


def split_fused(tensor: StoredTensor, config: ModelConfig) -> list[StoredTensor]:
    """Phi-3 stores q, k, v as one matrix and gate, up as another: their rows, as the tensors they are elsewhere.

    So with what a quantised one is made of: in AWQ and GPTQ files rows of the matrix lie in columns."""
    prefix, _, last = tensor.name.rpartition(".")
    prefix, _, part = prefix.rpartition(".")
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    fused = {
        "qkv_proj": {"q_proj": q, "k_proj": kv, "v_proj": kv},
        "gate_up_proj": {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size},
    }
    rows = fused.get(part)
    if rows is None:
        return [tensor]
    names = [f"{prefix}.{name}.{last}" for name in rows]
    if last.endswith("g_idx") or (last != "weight" and math.prod(tensor.shape) <= 2):  # weight_shape, a scale for all
        return [dataclasses.replace(tensor, name=name) for name in names]
    before = tensor.shape[: 1 if last in ("qweight", "qzeros", "scales") else 0]
    after = tensor.shape[len(before) :] or (0,)
    unit = sum(rows.values()) // max(1, after[0])  # rows of the matrix in one of this tensor
    if unit * after[0] != sum(rows.values()) or any(count % unit for count in rows.values()):
        return [tensor]
    parts, row = [], 0
    for name, count in zip(names, (count // unit for count in rows.values()), strict=True):
        source = functools.partial(_slice, tensor, (*before, after[0], -1), row, row + count)
        parts.append(dataclasses.replace(tensor, name=name, shape=(*before, count, *after[1:]), source=source))
        row += count
    return parts


def _slice(tensor: StoredTensor, shape: tuple[int, ...], start: int, end: int) -> npt.NDArray[np.uint8]:
    return tensor.data.reshape(shape)[..., start:end, :]


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model of this config, in loading order -> its shape (row-major, [out, in])."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (q, hidden, config.attention_bias),
        "self_attn.k_proj": (kv, hidden, config.attention_bias),
        "self_attn.v_proj": (kv, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, q, config.output_bias),
        "mlp.gate_proj": (ffn, hidden, config.mlp_bias),
        "mlp.up_proj": (ffn, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, ffn, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        layer = f"{_LAYER}{index}."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        if config.qk_norm:
            shapes[layer + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[layer + "self_attn.k_norm.weight"] = (config.head_dim,)
        for part, (rows, columns, bias) in linears.items():
            shapes[f"{layer}{part}.weight"] = (rows, columns)
            if bias:
                shapes[f"{layer}{part}.bias"] = (rows,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_tensors(tensors: Mapping[str, StoredTensor], config: ModelConfig, where: str) -> dict[str, StoredTensor]:
    """The tensors in loading order, if they are just those of the config; else CheckpointError naming a few."""
    shapes = expected_shapes(config)
    if missing := [name for name in shapes if name not in tensors]:
        raise CheckpointError(f"{where} lacks {_few(missing)}, which a {config.architecture} of this config has")
    if leftover := sorted(name for name in tensors if name not in shapes):
        raise CheckpointError(
            f"{where} has {_few(leftover)}, which a {config.architecture} of this config does not use; "
            "a model that needs them would answer wrongly without"
        )
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise CheckpointError(f"{where}: {name} has the shape {tensors[name].shape}, but the config says {shape}")
    return {name: tensors[name] for name in shapes}


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    count = f"{len(names)} tensors: " if len(names) > 1 else "the tensor "
    return count + shown + (", ..." if len(names) > 3 else "")
