"""Writes data/llama_cpp_variants.json: llama.cpp's token ids for the other pre-tokenizers, on SmolLM2's vocabulary.

    python -m bench.peers.install DIR
    python -m tests.engine.checkpoint.llama_cpp_variants DIR

Each variant is SmolLM2's metadata with another `tokenizer.ggml.pre`, a few more tokens and no tensors; the strings are
those of data/llama_cpp_tokens.json, in its order.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoint.gguf import read_gguf
from engine.checkpoint.gguf_tokenizer import PRE_TOKENIZERS
from engine.checkpoint.pull import pull
from engine.checkpoint.tokenizer import byte_of_character
from tests.engine.checkpoint.files import write_gguf

DATA = Path(__file__).parent / "data" / "llama_cpp_variants.json"
SENTENCEPIECE = "SentencePiece"  # another tokenizer model rather than another pre-tokenizer
SCRIPT = Path(__file__).parents[3] / "bench" / "peers" / "llama_cpp_tokens.mjs"


def variant(metadata: dict[str, Any], pre: str) -> dict[str, Any]:
    """With numbers of several digits, and a word that no merges lead to: without them the variants could not differ."""
    tokens = ["20", "12", "123", "1234", "34", "22", "201", "2018", "\u0120PascalCaseWord", "\u0120camelCase"]
    merges = ["1 2", "12 3", "123 4", "3 4", "2 2", "2 0", "20 1", "201 8", "\u0120camel Case"]
    if pre == SENTENCEPIECE:
        return metadata | sentencepiece(metadata["tokenizer.ggml.tokens"])
    kinds = metadata["tokenizer.ggml.token_type"]
    return metadata | {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": metadata["tokenizer.ggml.tokens"] + tokens,
        "tokenizer.ggml.merges": metadata["tokenizer.ggml.merges"] + merges,
        "tokenizer.ggml.token_type": np.concatenate([kinds, np.ones(len(tokens), kinds.dtype)]),
    }


def sentencepiece(tokens: list[str]) -> dict[str, Any]:
    """A vocabulary of Llama 2's kind from the pieces of a byte-level one that are whole characters."""
    byte_of = byte_of_character()
    pieces: dict[str, None] = {}
    for token in tokens[17:]:
        with contextlib.suppress(UnicodeDecodeError):
            text = bytes(byte_of[character] for character in token).decode()
            if not any(character.isspace() for character in text[1:]) and text[0] not in "\t\n\r":
                pieces[text.replace(" ", "\u2581")] = None
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    head = special + [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [2, 3, 3, 3, 3, 3] + [6] * 256 + [1] * len(pieces)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*head, *pieces],
        "tokenizer.ggml.scores": np.array([0.0] * len(head) + [-float(i) for i in range(len(pieces))], np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def main(binding: str) -> None:
    metadata = read_gguf(pull("smollm2")).metadata
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for pre in [*PRE_TOKENIZERS, SENTENCEPIECE]:
            path = Path(folder, "variant.gguf")
            write_gguf(path, variant(metadata, pre), shapes={})
            command = ["node", str(SCRIPT), binding, str(path)]
            run = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            result[pre] = {kind: [entry["ids"] for entry in run[kind]] for kind in ("plain", "special")}
    kept = {pre: ids for pre, ids in result.items() if ids not in list(result.values())[: list(result).index(pre)]}
    same = {pre: next(other for other in kept if kept[other] == ids) for pre, ids in result.items() if pre not in kept}
    DATA.write_text(json.dumps({"ids": kept, "same_as": same}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
