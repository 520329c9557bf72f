"""Quantised folders: what is refused, by the name of the field or tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import open_checkpoint
from engine.checkpoint.quantized import scheme_of
from engine.errors import CheckpointError
from tests.engine.quantized_files import KINDS, TOKENS, compressed, quantise, weights_of, zero_biases

PACKED = "pack-quantized"


def packed(**changes: Any) -> dict[str, Any]:
    return compressed(PACKED, weights_of(4, True, 32) | changes)


REFUSED: list[tuple[Any, str]] = [
    ([], "quantization_config must be an object"),
    ({"load_in_8bit": True}, "is bitsandbytes"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "is bitsandbytes"),
    ({"quant_method": "hqq"}, "quant_method is 'hqq'; supported: awq, gptq, compressed-tensors, fp8"),
    ({}, "quant_method is missing"),
    ({"quant_method": "awq", "version": "marlin"}, "version is 'marlin'; supported: gemm"),
    ({"quant_method": "awq", "version": "gemv"}, "version is 'gemv'"),
    ({"quant_method": "awq", "bits": 3}, "bits is 3"),
    ({"quant_method": "awq", "zero_point": False}, "zero_point is False"),
    ({"quant_method": "gptq", "group_size": 128, "bits": 3}, "bits is 3; supported: 4, 8"),
    ({"quant_method": "gptq", "bits": 4}, "group_size is missing"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 100}, "group_size is 100"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 10**9}, "group_size is 1000000000"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, "is 'marlin'; supported"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128, "is_marlin_format": True}, "is_marlin_format is True"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:.*mlp.*": {}}}, "dynamic is"),
    ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "weight_block_size is [64, 64]"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2'"),
    (packed(num_bits=3), "weights: num_bits is 3"),
    (packed(type="float"), "weights: type is 'float'"),
    (packed(strategy="tensor"), "strategy is 'tensor'; supported: group, channel"),
    (packed() | {"format": "marlin-24"}, "format is 'marlin-24'"),
    (packed() | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    (packed() | {"config_groups": {}}, "config_groups must be an object with one group"),
    (packed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    (compressed(PACKED, weights_of(4, True, 32), TOKENS), "input_activations"),
    (compressed("int-quantized", weights_of(8, False, 0), TOKENS), "symmetric is False"),
    (compressed("int-quantized", weights_of(8, True, 32), TOKENS), "strategy is 'group'; supported: tensor, channel"),
    (compressed("int-quantized", weights_of(8, True, 0), TOKENS | {"num_bits": 4}), "input_activations: num_bits is 4"),
    (compressed("int-quantized", weights_of(8, True, 0), TOKENS | {"symmetric": False}), "symmetric is False"),
    (compressed("float-quantized", weights_of(8, True, 0, "float"), TOKENS), "input_activations: type is 'int'"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "named"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(config: Any, named: str) -> None:
    with pytest.raises(CheckpointError) as error:
        scheme_of({"quantization_config": config}, "config.json")
    assert named in str(error.value) and "config.json" in str(error.value)


def test_every_layout_has_a_name() -> None:
    names = {kind: scheme_of({"quantization_config": config}, "") for kind, (config, _) in KINDS.items()}
    assert all(scheme is not None for scheme in names.values())
    assert {scheme.name for scheme in names.values() if scheme} == {
        "AWQ", "GPTQ 4-bit", "GPTQ 8-bit", "W4A16", "W8A16", "W8A8", "FP8",
    }  # fmt: skip
    assert scheme_of({}, "") is None


@pytest.mark.parametrize(
    ("part", "value", "named"),
    [
        ("qzeros", None, "lacks model.layers.0.mlp.up_proj.qzeros, which AWQ has"),
        ("qzeros", torch.zeros(4, 19, dtype=torch.int32), "up_proj.qzeros is I32 [4, 19]; AWQ has I32 [2, 20]"),
        ("scales", torch.zeros(2, 160, dtype=torch.int64), "up_proj.scales is I64 [2, 160]; AWQ has F32 or F16"),
        ("extra", torch.zeros(1), "mlp.up_proj.extra"),
    ],
)
def test_parts_are_checked(
    random_checkpoint: Callable[..., Path], tmp_path: Path, part: str, value: torch.Tensor | None, named: str
) -> None:
    folder, _ = quantise(random_checkpoint(), "awq", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.0.mlp.up_proj.{part}"
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(str(folder))
    assert named in str(error.value)


def test_integers_without_a_scheme_are_refused(random_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, _ = quantise(random_checkpoint(), "w8a16 int", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"weight has the dtype I8; supported: F32, F16, BF16"):
        open_checkpoint(str(folder))


def test_the_first_gptq_files_say_it_in_a_file_of_their_own(
    random_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder, _ = quantise(random_checkpoint(), "gptq 4 sym", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.quantization == "GPTQ 4-bit"
    assert checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].nbytes < 0.6 * 160 * 64 + 500


def test_gptq_biases_of_zeros_are_left_out_and_others_are_not(
    random_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder, _ = quantise(random_checkpoint(), "gptq 4 sym", tmp_path)
    zero_biases(folder)
    assert not [name for name in open_checkpoint(str(folder)).tensors if name.endswith("bias")]
    zero_biases(folder, 0.5)
    with pytest.raises(CheckpointError, match=r"has 14 tensors: .*\.bias, .* which a Llama.* does not use"):
        open_checkpoint(str(folder))
