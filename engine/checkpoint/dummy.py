"""Dummy weights: any config with random numbers that depend only on the tensor's name; for measuring, no download."""

from __future__ import annotations

import functools
import math
import statistics
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from engine.checkpoint.names import expected_shapes
from engine.checkpoint.quantized import Scheme
from engine.checkpoint.tensors import StoredTensor, stored_bytes
from engine.checkpoint.tokenizer import Tokenizer, byte_of_character
from engine.errors import CheckpointError
from engine.model.config import ModelConfig

_LLAMA: dict[str, Any] = {"architecture": "LlamaForCausalLM"}
SHAPES: dict[str, ModelConfig] = {
    "llama-3-8b": ModelConfig(
        **_LLAMA, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
        num_kv_heads=8, head_dim=128, max_position=8192, rope_theta=500000.0, eos_token_ids=(128001,),
    ),
    "yi-6b": ModelConfig(
        **_LLAMA, vocab_size=64000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32,
        num_kv_heads=4, head_dim=128, max_position=4096, rope_theta=5000000.0, eos_token_ids=(2,),
    ),
    "yi-34b": ModelConfig(
        **_LLAMA, vocab_size=64000, hidden_size=7168, intermediate_size=20480, num_layers=60, num_heads=56,
        num_kv_heads=8, head_dim=128, max_position=4096, rope_theta=5000000.0, eos_token_ids=(2,),
    ),
    "smollm2-135m": ModelConfig(
        **_LLAMA, vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
        num_kv_heads=3, head_dim=64, max_position=8192, rope_theta=100000.0, tie_embeddings=True, eos_token_ids=(0,),
    ),
}  # fmt: skip

_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


# What a shape's name may end in: its layers are quantised so.
BLOCK = 1 << 21  # random words that are drawn for a tensor; a larger one repeats them
SCHEMES = {
    "-w4a16": Scheme("PACKED", "W4A16", 4, 128),
    "-w4a16-head": Scheme("PACKED", "W4A16 with its head", 4, 128, head=True),
    "-w8a16": Scheme("INT8", "W8A16"),
    "-w8a8": Scheme("W8A8", "W8A8"),
    "-fp8": Scheme("FP8_A8", "FP8"),
}


def dummy_tensors(config: ModelConfig, scheme: Scheme | None = None) -> dict[str, StoredTensor]:
    """Tensors made when they are read: norms are one, biases zero, weights have the variance 1 / columns.

    BF16, normally distributed; with a scheme the layers' are of that form instead, and their integers are uniform. A
    head that is the embedding's table (SmolLM2's) stays as it is.
    """
    tensors: dict[str, StoredTensor] = {}
    for name, shape in expected_shapes(config).items():
        if scheme is None or not name.endswith(("_proj.weight", "lm_head.weight")[: 1 + scheme.head]):
            tensors[name] = StoredTensor(name, "BF16", shape, functools.partial(_values, name, shape))
            continue
        parts: dict[str, StoredTensor] = {}
        for part, (dtypes, shapes) in scheme.parts(shape[0], shape[1])[0].items():
            floats = "F16" if scheme.group else "F32"  # as files have it
            kind = floats if part.endswith(("scale", "scales")) else dtypes[0]
            make = functools.partial(_part, f"{name}.{part}", kind, shapes[0], shape, scheme)
            parts[part] = StoredTensor(part, kind, shapes[0], make)
        tensors[name] = StoredTensor(name, scheme.kind, shape, np.empty(0), parts)
    return tensors


def _part(name: str, kind: str, shape: tuple[int, ...], weight: tuple[int, ...], scheme: Scheme) -> npt.NDArray[Any]:
    if kind == "I64":
        return np.array(weight)
    if kind in ("F32", "F16"):  # integers are uniform over 2^bits; FP8 bytes are made with exponents below 8: |w| < 2
        deviation = 0.6 if scheme.kind == "FP8_A8" else 2**scheme.bits / math.sqrt(12)
        return np.full(shape, 1 / (deviation * math.sqrt(weight[1])), np.float32 if kind == "F32" else np.float16)
    random = np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))
    size = stored_bytes(kind, shape)
    raw = _repeated(np.frombuffer(random.bytes(min(size, 8 * BLOCK)), np.uint8), size)
    return raw & np.uint8(0xBF) if kind == "F8_E4M3" else raw


def _values(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.uint16]:
    if name.endswith("bias"):
        return np.zeros(shape, np.uint16)
    if len(shape) == 1:
        return np.full(shape, 0x3F80, np.uint16)  # 1.0 in BF16
    # A random byte picks one of 256 quantiles, and 16 bits pick two at once: a billion weights take seconds.
    quantiles = (_normal_quantiles() / np.float32(math.sqrt(shape[-1]))).view(np.uint32) >> 16
    pairs = (quantiles[:, None] << 16 | quantiles).reshape(-1)
    count = math.prod(shape)
    random = np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))
    picks = random.integers(0, 1 << 64, min(-(-count // 8), BLOCK), np.uint64).view(np.uint16)
    return _repeated(pairs[picks].view(np.uint16), count).reshape(shape)


def _repeated(block: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """`count` elements; np.resize takes ten times as long."""
    found = np.empty(count, block.dtype)
    for start in range(0, count, len(block)):
        found[start : start + len(block)] = block[: count - start]
    return found


@functools.cache
def _normal_quantiles() -> npt.NDArray[np.float32]:
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 256) for i in range(256)], np.float32)


def dummy_tokenizer(config: ModelConfig) -> Tokenizer:
    """One token per byte; the ids above 255 decode to words of their own number, so that streams of them are text."""
    alphabet = sorted(byte_of_character(), key=byte_of_character().__getitem__)
    if config.vocab_size < len(alphabet):
        raise CheckpointError(f"vocab_size is {config.vocab_size}; the tokenizer of dummy weights needs at least 256")
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    vocabulary |= {f"\u0120w{i}": i for i in range(len(alphabet), config.vocab_size)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, bos_id=config.bos_token_id, eos_ids=config.eos_token_ids, chat_template=_TEMPLATE)
