"""Quantised weights of safetensors folders: what config.json says of them, and the tensors that make up each one.

    scheme    of a linear [N, K], in groups of G columns, b bits, 32 / b integers in a word
    AWQ       qweight I32 [K, N b/32], qzeros I32 [K/G, N b/32], scales [K/G, N]
    GPTQ(_V2) qweight I32 [K b/32, N], qzeros I32 [K/G, N b/32], scales [K/G, N], g_idx I32 [K]
    PACKED    weight_packed I32 [N, K b/32], weight_scale [N, K/G], weight_shape I64 [2]; weight_zero_point I32
              [N b/32, K/G] if asymmetric; weight_g_idx I32 [K] if columns are not in order of their groups
    INT8, W8A8  weight I8 [N, K], weight_scale [N, 1] or one for all
    FP8, FP8_A8  weight F8_E4M3 [N, K], weight_scale [N], [N, 1] or one for all, or weight_scale(_inv) [N/128, K/128]

Activations of W8A8 and FP8_A8 are rounded to 8 bits a row at a time where they are multiplied. A scale for them that
the file holds (input_scale) is not used: the row's own is never coarser. FP8 activations are rounded only on GPUs that
multiply float8, and only where the weights have no blocks.
`kernels.formats` has the arithmetic.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from engine.checkpoint.config import Fields
from engine.checkpoint.names import expected_shapes
from engine.checkpoint.tensors import FLOATS, StoredTensor
from engine.errors import CheckpointError
from engine.model.config import ModelConfig

METHODS = ("awq", "gptq", "compressed-tensors", "fp8", "fbgemm_fp8")
BLOCK = 128  # of FP8 in blocks
UNUSED = ("input_scale", "input_zero_point")

Parts = dict[str, tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]]  # name -> the stored types and shapes allowed


@dataclasses.dataclass(frozen=True)
class Scheme:
    """kind: a scheme of the table above. name: for people. group: columns that share a scale, 0: a whole row. head:
    the head is of this kind, too."""

    kind: str
    name: str
    bits: int = 8
    group: int = 0
    blocks: bool = False
    head: bool = False

    def parts(self, n: int, k: int) -> tuple[Parts, Parts]:
        """The tensors of a linear [n, k]: those that must be there, and those that may."""

        def words(size: int) -> int:
            return -(-size * self.bits // 32)

        groups = -(-k // self.group) if self.group else 1
        ints: tuple[str, ...] = ("I32",)
        if self.kind in ("AWQ", "GPTQ", "GPTQ_V2"):
            rows: Parts = {"qzeros": (ints, ((groups, words(n)),)), "scales": (FLOATS, ((groups, n),))}
            if self.kind == "AWQ":
                return rows | {"qweight": (ints, ((k, words(n)),))}, {}
            return rows | {"qweight": (ints, ((words(k), n),))}, {"g_idx": (ints, ((k,),))}
        if self.kind == "PACKED":
            packed: Parts = {"weight_packed": (ints, ((n, words(k)),)), "weight_shape": (("I64",), ((2,),))}
            optional: Parts = {"weight_zero_point": (ints, ((words(n), groups),)), "weight_g_idx": (ints, ((k,),))}
            return packed | {"weight_scale": (FLOATS, ((n, groups),))}, optional
        one = (n, 1), (n,), (1,), (), (1, 1)
        scale = ((-(-n // BLOCK), -(-k // BLOCK)),) if self.blocks else one
        stored = "F8_E4M3" if self.kind in ("FP8", "FP8_A8") else "I8"
        return {"weight": ((stored,), ((n, k),)), "weight_scale": (FLOATS, scale)}, {}


def scheme_of(config: dict[str, Any], where: str) -> Scheme | None:
    """The quantisation that a config.json states; None: none. What is not supported is refused by name."""
    values = config.get("quantization_config")
    if values is None:
        return None
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: quantization_config must be an object")
    fields = Fields(values, f"{where}: quantization_config")
    if values.get("load_in_8bit") or values.get("load_in_4bit") or values.get("quant_method") == "bitsandbytes":
        raise fields.fail(
            "quant_method",
            "is bitsandbytes, whose weights are not supported: their outliers need its own kernels; supported: "
            + ", ".join(METHODS),
        )
    method = fields.word("quant_method", METHODS)
    if method == "awq":
        fields.word("version", ("gemm", "GEMM"), default="gemm")
        fields.refuse({"bits": (4,), "w_bit": (4,), "zero_point": (True,)})
        return Scheme("AWQ", "AWQ", 4, _group(fields, "group_size", default=128))
    if method == "gptq":
        layout = fields.word("checkpoint_format", ("gptq", "gptq_v2"), default="gptq")
        fields.refuse({"is_marlin_format": (False,), "dynamic": ({},), "quant_type": ("int",)})
        bits = _bits(fields, "bits", (4, 8))
        kind = "GPTQ_V2" if layout == "gptq_v2" else "GPTQ"
        return Scheme(kind, f"GPTQ {bits}-bit", bits, _group(fields, "group_size"))
    if method == "compressed-tensors":
        return _compressed_tensors(fields)
    fields.word("fmt", ("e4m3",), default="e4m3")
    block = fields.get("weight_block_size")
    if block not in (None, [BLOCK, BLOCK]):
        raise fields.fail("weight_block_size", f"is {str(block)[:60]}; [{BLOCK}, {BLOCK}] is supported")
    return Scheme("FP8_A8" if block is None else "FP8", "FP8", blocks=block is not None)


def _bits(fields: Fields, name: str, allowed: tuple[int, ...]) -> int:
    if (bits := fields.get(name)) not in allowed or isinstance(bits, bool):
        raise fields.fail(name, f"is {str(bits)[:60]}; supported: {', '.join(map(str, allowed))}")
    return int(bits)


def _group(fields: Fields, name: str, default: int | None = None) -> int:
    group = fields.integer(name, 1 << 20, low=-1, default=default)
    if group == 0 or (group > 0 and group % 16):
        raise fields.fail(name, f"is {group}; -1 (a row) or a multiple of 16 is supported")
    return max(group, 0)


def _compressed_tensors(fields: Fields) -> Scheme:
    """https://github.com/vllm-project/compressed-tensors: one group of linears, whatever it leaves out is dense."""
    where = fields.where
    layout = fields.word(
        "format", ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
    )
    fields.refuse({"kv_cache_scheme": (), "sparsity_config": ({},), "transform_config": ({},)})
    groups = fields.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1 or not isinstance(group := next(iter(groups.values())), dict):
        raise fields.fail("config_groups", "must be an object with one group; several are not supported")
    if not isinstance(group.get("weights"), dict):
        raise fields.fail("config_groups", "has a group without weights, which is not supported")
    layout = group.get("format") or layout
    of_group = Fields(group, f"{where}: config_groups")
    of_group.refuse({"output_activations": ()})
    weights = Fields(group["weights"], f"{where}: config_groups: weights")
    kind = weights.word("type", ("int", "float"), default="int")
    strategy = weights.word("strategy", ("tensor", "channel", "group", "block"))
    activations = group.get("input_activations") or {}
    if not isinstance(activations, dict):
        raise of_group.fail("input_activations", "must be an object")
    inputs = Fields(activations, f"{where}: config_groups: input_activations")
    if layout == "pack-quantized":
        of_group.refuse({"input_activations": ()})
        weights.refuse({"type": ("int",)})
        bits = _bits(weights, "num_bits", (4, 8))
        weights.word("strategy", ("group", "channel"))
        group_size = _group(weights, "group_size") if strategy == "group" else 0
        return Scheme("PACKED", f"W{bits}A16", bits, group_size)
    _bits(weights, "num_bits", (8,))
    weights.refuse({"symmetric": (True,)})
    if activations:
        _bits(inputs, "num_bits", (8,))
        inputs.word("type", (kind,), default="int")
        inputs.refuse({"symmetric": (True,)})
    weights.word("strategy", ("tensor", "channel") if kind == "int" else ("tensor", "channel", "block"))
    if kind == "float":
        if strategy == "block" and weights.get("block_structure") != [BLOCK, BLOCK]:
            raise weights.fail("block_structure", f"must be [{BLOCK}, {BLOCK}]")
        blocks = strategy == "block"
        return Scheme("FP8_A8" if activations and not blocks else "FP8", "FP8", blocks=blocks)
    return Scheme("W8A8", "W8A8") if activations else Scheme("INT8", "W8A16")


def join_parts(
    tensors: dict[str, StoredTensor], config: ModelConfig, scheme: Scheme | None, where: str
) -> dict[str, StoredTensor]:
    """The tensors of a folder with those that make up one quantised weight joined under the weight's name.

    A linear that is there as one float tensor is dense. AutoGPTQ writes a bias of zeros for every linear: those that
    the config does not know are left out. Raises CheckpointError naming a part that is missing, of a wrong type or of a
    wrong shape.
    """
    shapes_of = expected_shapes(config)
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if scheme is None or name in shapes_of or not name.endswith(".bias") or tensor.data.any()
    }
    for name, shape in shapes_of.items():
        stem = name.removesuffix("weight")
        if len(shape) != 2 or (name in tensors and tensors[name].dtype in FLOATS) or scheme is None:
            continue
        n, k = shape
        required, optional = scheme.parts(n, k)
        found: dict[str, StoredTensor] = {}
        for part in UNUSED:
            tensors.pop(stem + part, None)
        for part, (dtypes, shapes) in {**required, **optional}.items():
            stored = tensors.pop(stem + part, None)
            if stored is None and part == "weight_scale":  # DeepSeek's name; it is no inverse
                stored = tensors.pop(stem + "weight_scale_inv", None)
            if stored is None:
                continue
            if stored.dtype not in dtypes or stored.shape not in shapes:
                raise CheckpointError(
                    f"{where}: {stem}{part} is {stored.dtype} {list(stored.shape)}; {scheme.name} has "
                    f"{' or '.join(dtypes)} {' or '.join(str(list(s)) for s in shapes)} there"
                )
            found[part] = stored
        if found:
            if missing := [part for part in required if part not in found]:
                raise CheckpointError(f"{where} lacks {stem}{missing[0]}, which {scheme.name} has")
            if n * scheme.bits % 32 and scheme.kind in ("AWQ", "GPTQ", "GPTQ_V2"):
                raise CheckpointError(f"{where}: {name} has {n} rows, which {scheme.name} cannot pack into whole words")
            tensors[name] = StoredTensor(name, scheme.kind, shape, np.empty(0), found)
    for tensor in tensors.values():
        if not tensor.parts and tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{where}: {tensor.name} has the dtype {tensor.dtype}; supported: {', '.join(FLOATS)}"
            )
    return tensors
