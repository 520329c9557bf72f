"""Quantised checkpoints run as they are: the logits of the same weights dequantised, and of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import open_checkpoint
from engine.core.runner import Runner
from engine.messages import EngineOptions
from kernels.formats import decode, dequantize
from tests.engine.quantized_files import KINDS, packed, quantise, weights_of, zero_biases

TOKENS = [5, 9, 300, 17, 4, 80, 33, 200, 150]
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 32}
# As many columns as q, k, v have rows: what has an entry for each column must not be split with the rows. Blocks of 128
FUSED = SHAPE | {
    "hidden_size": 384,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 128,
}


def logits_of(folder: Path, dtype: str, rows: int) -> torch.Tensor:
    """float32 [T, V], `rows` positions at a time."""
    options = EngineOptions(model=str(folder), dtype=dtype, device="cpu", kv_cache_tokens=256)
    runner = Runner(open_checkpoint(str(folder)), options)
    return torch.cat([runner.logits(TOKENS[i : i + rows], i) for i in range(0, len(TOKENS), rows)])


@pytest.mark.parametrize("kind", KINDS)
def test_as_the_same_weights_dequantised(random_checkpoint: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    quantised, dense = quantise(random_checkpoint(**SHAPE), kind, tmp_path)
    exact = logits_of(dense, "float32", len(TOKENS))
    difference = (logits_of(quantised, "float32", len(TOKENS)) - exact).norm() / exact.norm()
    # W8A8 rounds activations to 127 steps, in float32 too: that is the format, and random weights make much of it.
    assert difference < (6e-2 if kind == "w8a8" else 1e-5), difference
    for rows in (1, len(TOKENS)):  # the packed ops and the dense ones, with 16-bit activations
        fast = logits_of(quantised, "auto", rows)
        assert (fast - exact).norm() / exact.norm() < (6e-2 if kind == "w8a8" else 3e-2), rows


@pytest.mark.parametrize("kind", ["w4a16 sym", "w8a16 channel", "fp8 channel", "w8a8"])
@torch.inference_mode()
def test_transformers_agrees(random_checkpoint: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """compressed-tensors folders, loaded by the library of that name (which cannot load asymmetric ones here)."""
    import transformers

    quantised, _ = quantise(random_checkpoint(**SHAPE), kind, tmp_path)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(quantised, dtype=torch.float32)
    expected = model(torch.tensor([TOKENS])).logits[0].float()
    found = logits_of(quantised, "float32", len(TOKENS))
    difference = (found - expected).norm() / expected.norm()
    # It rounds activations with a scale of its own, fp8 ones among them, which a CPU leaves as they are here.
    assert difference < {"w8a8": 8e-2, "fp8 channel": 0.15}.get(kind, 1e-4), difference


@pytest.mark.parametrize("kind", ["awq", "gptq 4 act-order", "gptq 8 sym", "w4a16 asym", "fp8 block"])
def test_fused_linears(random_checkpoint: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """Phi-3's q, k, v are one matrix in the file, and gate, up another: in AWQ and GPTQ files they lie side by side."""
    quantised, dense = quantise(random_checkpoint("Phi3", **FUSED), kind, tmp_path)
    if kind.startswith("gptq"):
        zero_biases(quantised)
    found, exact = (logits_of(folder, "float32", len(TOKENS)) for folder in (quantised, dense))
    assert (found - exact).norm() / exact.norm() < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_asymmetric_packing_is_the_librarys(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    parts, dense = packed(torch.randn(48, 128), bits, False, 32)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights_of(bits, False, 32)))
    theirs = PackedQuantizationCompressor.decompress(parts, scheme)["weight"].float()
    assert torch.allclose(theirs, dense, rtol=2e-3)  # theirs is in fp16
    assert torch.equal(dequantize(decode("PACKED", parts)), dense)


def test_a_group_of_odd_columns_is_refused(random_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from engine.errors import CheckpointError

    folder, _ = quantise(random_checkpoint(**SHAPE), "gptq 4 act-order", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.g_idx"][:] = 0
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.weight cannot be used: g_idx has groups of different sizes"):
        logits_of(folder, "float32", 1)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_8_bit_kv_cache(random_checkpoint: Callable[..., Path], kind: str, dtype: str) -> None:
    checkpoint = open_checkpoint(str(random_checkpoint(**SHAPE)))
    found = {}
    for name in ("auto", kind):
        options = EngineOptions(model="", dtype=dtype, device="cpu", kv_cache_tokens=256, kv_cache_dtype=name)
        runner = Runner(checkpoint, options)
        logits = torch.cat([runner.logits(TOKENS[:5]), *(runner.logits([TOKENS[i]], i) for i in range(5, 9))])
        found[name] = logits, runner.info.kv_cache_bytes
    (exact, exact_bytes), (logits, num_bytes) = found.values()
    difference = (logits - exact).norm() / exact.norm()
    assert 1e-4 < difference < (3e-2 if kind == "int8" else 0.1), difference
    assert num_bytes / exact_bytes == (32 + 4) / (32 * (4 if dtype == "float32" else 2))
