"""Every GGUF block type that is kept as it is, against the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES

from engine.checkpoint.tensors import BLOCKS
from kernels.formats import DENSE, decode, dequantize, joined

GGUF = [kind for kind in BLOCKS if kind.startswith("Q")]


def blocks(kind: str, n: int = 16, count: int = 3) -> torch.Tensor:
    """uint8 [n, bytes of `count` blocks]: random bytes, with scales that are finite."""
    _, size = BLOCKS[kind]
    raw = np.random.default_rng(0).integers(0, 256, (n, count, size), np.uint8)
    halves = {"Q6_K": [208]}.get(kind, [0, 2] if kind.endswith(("_1", "_K")) else [0])
    for at in halves:
        raw[..., at + 1] &= 0x3B  # the exponent stays below 2
    return torch.from_numpy(raw.reshape(n, -1))


@pytest.mark.parametrize("kind", GGUF)
def test_gguf_blocks_bit_for_bit(kind: str) -> None:
    name = gguf.GGMLQuantizationType[kind]
    assert BLOCKS[kind] == GGML_QUANT_SIZES[name]
    raw = blocks(kind)
    weight = decode(kind, {"": raw})
    expected = torch.from_numpy(gguf.dequantize(raw.numpy(), name))
    assert torch.equal(dequantize(weight), expected)
    assert weight.bits == int(kind[1])
    assert torch.equal(dequantize(weight.rows(lambda x: x[3:5])), expected[3:5])
    half = weight.rows(lambda x: x[:8]), weight.rows(lambda x: x[8:])
    both = joined(list(half))
    assert both is not None and torch.equal(dequantize(both), expected)


def test_only_the_same_format_is_joined() -> None:
    weights = [decode(kind, {"": blocks(kind, count=count)}) for kind, count in (("Q4_1", 8), ("Q4_K", 1), ("Q5_K", 1))]
    assert joined(weights[:2]) is None and joined(weights[1:]) is None
    dense = [decode(kind, {"": torch.zeros(4, 32, dtype=torch.uint8)}) for kind in DENSE]
    assert joined(dense) is None and joined([dense[0], dense[0]]) is not None
