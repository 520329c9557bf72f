"""Small checkpoint files for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from engine.checkpoint.tokenizer import byte_of_character

# A Llama of one layer: 2 query heads, 1 key/value head.
VOCAB, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 260, 64, 96, 2, 1, 32
TENSORS = {
    "token_embd.weight": (VOCAB, HIDDEN),
    "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
    "blk.0.ffn_norm.weight": (HIDDEN,),
    "blk.0.ffn_gate.weight": (FFN, HIDDEN),
    "blk.0.ffn_up.weight": (FFN, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, FFN),
    "output_norm.weight": (HIDDEN,),
}


def tiny_metadata(arch: str = "llama") -> dict[str, Any]:
    alphabet = sorted(byte_of_character(), key=byte_of_character().__getitem__)
    return {
        "general.architecture": arch,
        f"{arch}.block_count": 1,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": FFN,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*alphabet, "he", "<|bos|>", "<|eos|>", "<tool>"],
        "tokenizer.ggml.token_type": np.array([1] * 257 + [3, 3, 4], np.int32),
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.ggml.add_bos_token": True,
    }


def write_gguf(
    path: Path,
    metadata: dict[str, Any] | None = None,
    shapes: dict[str, tuple[int, ...]] = TENSORS,
    kinds: dict[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """A GGUF file with random tensors, by the gguf package; kinds: types other than F32. Returns the stored arrays."""
    random = np.random.default_rng(0)
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return write_arrays(path, tiny_metadata() if metadata is None else metadata, arrays, kinds)


def write_arrays(
    path: Path, metadata: dict[str, Any], arrays: dict[str, np.ndarray], kinds: dict[str, str] | None = None
) -> dict[str, np.ndarray]:
    """The same with the float32 values of `arrays`."""
    writer = GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)
    stored = {}
    for name, values in arrays.items():
        kind = GGMLQuantizationType[(kinds or {}).get(name, "F32")]
        stored[name] = quantize(values, kind)
        writer.add_tensor(name, stored[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored
